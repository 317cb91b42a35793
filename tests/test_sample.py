"""Sampling from the command line: files, their metadata, images that depend on prompt and seed alone, bad input."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from fopd_jax import __version__, sample
from fopd_jax.adapters.lora import init_adapter
from fopd_jax.backbones.weights import boxed_variables
from fopd_jax.config.flags import parse_flags
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.evaluation.grid import draw_grid
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.interop.files.safetensors import load_tree, save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT, MMDiTConfig
from fopd_jax.performance.kept_programs import SCHEME
from fopd_jax.worlds.miniature.world import make_world

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
CONFIG = Path(__file__).parents[1] / "configs" / "miniature.py"
PROMPTS = ('sign "K7B"', "two red squares and one red circle", "three blue circles")
SIDE, STEPS, BATCH = 24, 3, 4
TINY = MMDiTConfig(
    depth=2, num_heads=2, head_dim=8, dual_layers=0, qk_norm=True, patch_size=4, channels=3,
    context_dim=32, pooled_dim=24, table_size=6, base_size=6,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_network() -> Iterator[None]:
    """A smaller network under the miniature's name: it compiles in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "miniature", TINY)
        yield


@pytest.fixture(scope="module")
def weights(small_network: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random base and a random adapter."""
    folder, rng = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    shapes = nn.unbox(boxed_variables(MMDiT(TINY), (SIDE, SIDE, 3)))
    adapter = jax.eval_shape(lambda: init_adapter(jax.random.key(0), shapes["params"], LoRAConfig(2, 4.0), TARGETS))

    def random(leaf: Any) -> np.ndarray:
        return 0.2 * rng.normal(size=leaf.shape).astype(np.float32)

    save_tree(folder / "base.safetensors", jax.tree.map(random, shapes), {"preset": "miniature"})
    save_adapter(folder / "adapter.safetensors", jax.tree.map(random, adapter), {"preset": "miniature"})
    save_adapter(folder / "other.safetensors", jax.tree.map(random, adapter), {"preset": "sd35_medium"})
    return folder


def _call(*arguments: str, config: Path | None = CONFIG) -> None:
    """What `python -m fopd_jax.sample` does, in this process."""
    argv = ["fopd_jax.sample", *([] if config is None else [f"--config={config}"]), *arguments]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for the config's fields
        sample.main(parse_flags(argv)[:1])


Run = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def run(weights: Path) -> Run:
    """Sample into a folder; returns the images in order."""

    def run(out: Path, *arguments: str, **fields: Any) -> list[Path]:
        fields = {"batch_size": BATCH, "num_steps": STEPS, "guidance": 2.0} | fields
        settings = [f"--config.eval.{name}={value}" for name, value in fields.items()]
        _call(f"--config.model.path={weights}/base.safetensors", f"--out={out}", *settings, *arguments)
        return sorted(out.glob("[0-9]*.png"))

    return run


def _flags(*prompts: str) -> list[str]:
    return [f"--prompt={prompt}" for prompt in prompts]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture).astype(int)


def _text(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        picture.load()
        return dict(picture.text)


def _request(path: Path) -> tuple[str, int]:
    return _text(path)["prompt"], int(_text(path)["seed"])


# ---- what is written


@pytest.fixture(scope="module")
def whole(run: Run, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three prompts, two seeds each: two batches, the second filled up."""
    out = tmp_path_factory.mktemp("whole") / "images"
    adapter = f"--adapter={weights}/adapter.safetensors"
    return run(out, *_flags(*PROMPTS), "--images-per-prompt=2", "--seed=5", adapter)


def test_programs_are_kept_where_all_programs_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places: list[str | None] = []
    monkeypatch.setattr(sample, "run", lambda *_: places.append(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("FOPD_JAX_CACHE", str(tmp_path))
    _call()
    _call("--config.run.compiled=")
    assert places == [f"{SCHEME}{tmp_path}/compiled", None]


def test_every_image_of_every_prompt_is_written_and_nothing_else(whole: list[Path]):
    names = [f"{i:05d}.png" for i in range(6)]
    assert [path.name for path in whole] == names
    assert {path.name for path in whole[0].parent.iterdir()} == {*names, "grid.png"}
    for path in whole:
        assert _pixels(path).shape == (SIDE, SIDE, 3)
        assert _pixels(path).std() > 10
    assert len({_pixels(path).tobytes() for path in whole}) == 6


def _settings(weights: Path) -> dict[str, Any]:
    return {
        "model": f"{weights}/base.safetensors",
        "model_sha256": hashlib.sha256((weights / "base.safetensors").read_bytes()).hexdigest(),
        "steps": STEPS,
        "guidance": 2.0,
        "transition": "ode",
        "shift": 3.0,
        "dtype": "float32",
        "height": SIDE,
        "width": SIDE,
        "version": __version__,
    }


def _adapter(weights: Path) -> dict[str, str]:
    path = weights / "adapter.safetensors"
    return {"source": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_an_image_carries_its_prompt_seed_and_settings(whole: list[Path], weights: Path):
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    assert [_request(path) for path in whole] == list(zip(prompts, range(5, 11), strict=True))
    for path in whole:
        assert _text(path).keys() == {"prompt", "negative_prompt", "seed", "settings"}
        assert _text(path)["negative_prompt"] == ""
        assert json.loads(_text(path)["settings"]) == _settings(weights) | {"adapter": _adapter(weights)}


def _grid(images: Any, rows: list[str], columns: list[str], title: str) -> np.ndarray:
    """What is drawn of pixels `[rows, columns, h, w, 3]`."""
    return np.asarray(draw_grid((np.asarray(images) / 127.5 - 1).astype(np.float32), rows, columns, title))


def _title(weights: Path, steps: int = STEPS, guidance: int = 2) -> str:
    return f"{weights}/base.safetensors, {steps} steps, guidance {guidance}, ode, shift 3, float32, {SIDE} pixels"


def test_the_grid_shows_prompts_as_columns_and_images_as_rows(whole: list[Path], weights: Path):
    images = np.stack([_pixels(path) for path in whole]).reshape(3, 2, SIDE, SIDE, 3).swapaxes(0, 1)
    columns = [f"{prompt}\nseeds {5 + 2 * i} to {6 + 2 * i}" for i, prompt in enumerate(PROMPTS)]
    expected = _grid(images, ["adapter\nimage 1", "adapter\nimage 2"], columns, _title(weights))
    grid = whole[0].parent / "grid.png"
    np.testing.assert_array_equal(_pixels(grid), expected)
    text = _text(grid)
    assert json.loads(text["prompts"]) == list(PROMPTS)
    assert json.loads(text["seeds"]) == [[5, 6], [7, 8], [9, 10]]
    assert text["negative_prompt"] == ""
    assert json.loads(text["settings"]) == _settings(weights) | {"adapters": [_adapter(weights)]}


def test_the_grid_is_limited_to_eight_prompts_and_seeds(
    run: Run, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = [f"{count} red {shape}" for count in ("two", "three") for shape in ("squares", "circles", "triangles")]
    prompts += [f"one blue {shape}" for shape in ("square", "circle", "triangle")]
    counts = ["--images-per-prompt=9", "--shared-seed"]
    images = run(tmp_path, *_flags(*prompts), *counts, batch_size=27, num_steps=1, guidance=1.0)
    assert [_request(path) for path in images] == [(prompt, seed) for prompt in prompts for seed in range(9)]
    out = capsys.readouterr().out
    assert re.search(r"81 images of 24 pixels in .*; grid\.png shows 8 of 9 prompts, 8 of 9 seeds", out)
    assert f"note: this is the base alone; `python -m fopd_jax.main --config={CONFIG}` trains runs/miniature/st" in out
    cells = np.stack([_pixels(path) for path in images]).reshape(9, 9, SIDE, SIDE, 3).swapaxes(0, 1)[:8, :8]
    expected = _grid(cells, [f"base\nseed {i}" for i in range(8)], prompts[:8], _title(weights, 1, 1))
    np.testing.assert_array_equal(_pixels(tmp_path / "grid.png"), expected)


def test_several_adapters_are_rows_below_the_base(
    run: Run, whole: list[Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All draw the same requests, none in a batch larger than those; what guidance leads away from shows."""
    sizes: list[int] = []

    def record(self: Sampler, *arguments: Any) -> np.ndarray:
        sizes.append(len(arguments[3]))
        return call(self, *arguments)

    call = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", record)
    (tmp_path / "student").mkdir()
    other = shutil.copy(weights / "adapter.safetensors", tmp_path / "student" / "adapter.safetensors")
    adapters = [f"--adapter={weights}/adapter.safetensors", f"--adapter={other}"]
    negative = "--negative-prompt=two red squares"
    found = run(tmp_path / "out", *_flags(*PROMPTS[:2]), *adapters, negative, "--seed=5", batch_size=64)
    assert sizes == [2, 2, 2]
    names = ["base", f"{weights.name}_adapter", "student_adapter"]
    assert [path.name for path in found] == sorted(f"0000{i}_{name}.png" for i in range(2) for name in names)
    by_name = {path.name: path for path in found}
    first = [by_name[f"00000_{name}.png"] for name in names]
    assert [json.loads(_text(path)["settings"])["adapter"] is None for path in first] == [True, False, False]
    assert {_text(path)["negative_prompt"] for path in found} == {"two red squares"}
    np.testing.assert_array_equal(_pixels(first[1]), _pixels(first[2]))
    assert np.abs(_pixels(first[0]) - _pixels(first[1])).max() > 5
    assert np.abs(_pixels(first[1]) - _pixels(whole[0])).max() > 2  # the negative prompt
    images = [[_pixels(by_name[f"0000{i}_{name}.png"]) for i in range(2)] for name in names]
    columns = [f"{prompt}\nseed {5 + i}" for i, prompt in enumerate(PROMPTS[:2])]
    title = f"{_title(weights)}\nnegative prompt: two red squares"
    np.testing.assert_array_equal(_pixels(tmp_path / "out" / "grid.png"), _grid(images, names, columns, title))


# ---- what an image depends on


def _same(found: Path, expected: Path) -> None:
    """Equal but for the rounding of programs of other batch sizes."""
    assert _request(found) == _request(expected)
    assert np.abs(_pixels(found) - _pixels(expected)).max() <= 1


@pytest.mark.parametrize("transition", ["ode", "sde"])
def test_an_image_depends_on_its_prompt_and_seed_alone(run: Run, tmp_path: Path, transition: str):
    fields = {"transition": transition, "noise_level": 0.5}
    two = ["--images-per-prompt=2", "--shared-seed"]
    together = run(tmp_path / "together", *_flags(*PROMPTS), *two, "--seed=5", **fields)
    # One at a time, in another order, counted from another seed.
    alone = run(tmp_path / "alone", *_flags(PROMPTS[2], PROMPTS[0]), *two, "--seed=6", batch_size=1, **fields)
    _same(alone[0], together[5])
    _same(alone[2], together[1])
    settings = json.loads(_text(alone[0])["settings"])
    assert settings["transition"] == transition
    assert settings.get("noise_level") == (0.5 if transition == "sde" else None)
    # Beside other prompts, at another place of the batch.
    beside = run(tmp_path / "beside", *_flags("one green square", "", PROMPTS[1], PROMPTS[1]), "--seed=4", **fields)
    _same(beside[2], together[3])
    assert np.abs(_pixels(together[2]) - _pixels(together[3])).max() > 50  # seeds
    assert np.abs(_pixels(together[1]) - _pixels(together[3])).max() > 5  # prompts


def test_sampling_again_gives_the_same_files(run: Run, whole: list[Path], weights: Path):
    before = {path.name: path.read_bytes() for path in whole[0].parent.iterdir()}
    adapter = f"--adapter={weights}/adapter.safetensors"
    run(whole[0].parent, *_flags(*PROMPTS), "--images-per-prompt=2", "--seed=5", adapter)
    assert {path.name: path.read_bytes() for path in whole[0].parent.iterdir()} == before


def test_an_adapter_and_a_prompts_file(run: Run, whole: list[Path], tmp_path: Path):
    """Prompts of a file follow those of flags; without the adapter the same requests give other images."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n{PROMPTS[2]}\n", encoding="utf-8")
    found = run(tmp_path / "out", *_flags(PROMPTS[0]), f"--prompts-file={tmp_path}/prompts.txt", "--seed=5")
    assert [_request(path) for path in found] == [(prompt, 5 + i) for i, prompt in enumerate(PROMPTS)]
    assert json.loads(_text(found[0])["settings"])["adapter"] is None
    assert _request(found[0]) == _request(whole[0])
    assert np.abs(_pixels(found[0]) - _pixels(whole[0])).max() > 5


def test_without_prompts_held_out_ones_are_drawn(run: Run, tmp_path: Path):
    images = run(tmp_path, guidance=1.0)
    expected = [prompt for task in make_world().tasks.values() for prompt in task.test[:4]]
    assert [_request(path) for path in images] == [(prompt, i) for i, prompt in enumerate(expected)]


# ---- bad input


def _said(call: Callable[[], Any]) -> list[str]:
    """The lines of something that ends for bad input."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as said:
        call()
    assert stop.value.code == 2
    return said.getvalue().splitlines()


def _error(out: Path, *arguments: str) -> str:
    """The one line that a user sees; no file is written."""
    (message,) = _said(lambda: _call(f"--out={out}", *arguments))
    assert message.startswith("error: ")
    assert not [path for path in out.rglob("*") if path.is_file()]
    return message


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with inputs that are not right."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "damaged.safetensors").write_bytes(b"\x00" * 40)
    return folder


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--nope=1"], ("'nope'",)),
        (["--config.eval.nope=1"], ("no such field", "'nope'")),
        (["--config.model.t5_length=0"], ("model.t5_length: found 0",)),
        (["--config.t5_length=0"], ("model.t5_length: found 0",)),  # its earlier name
        (["--seed=-1"], ("--seed=-1",)),
        (["--seed=5000000000"], ("--seed=5000000000",)),
        (["--seed=one"], ("--seed=one",)),
        (["--seed=2147483648", *["--prompt=a"] * 2049, "--images-per-prompt=1048576"], ("seed: the last image would",)),
        (["--images-per-prompt=0"], ("--images-per-prompt=0",)),
        (["--config.eval.batch_size=0"], ("eval.batch_size: found 0",)),
        (["--config.eval.num_steps=0"], ("eval.num_steps: found 0",)),
        (["--config.eval.transition=euler"], ("eval.transition: found 'euler'", "sde")),
        (["--config.eval.transition=sde", "--config.eval.noise_level=-1.0"], ("eval.noise_level: found -1.0",)),
        (["--config.model.dtype=half"], ("model.dtype: found 'half'",)),
        (["--config.model.preset=sd35_medium"], ("model.path: found", "'sd35_medium' needs a converted folder")),
        (["--config.model.path=FILES/missing.safetensors"], ("model.path", "missing.safetensors: no such file")),
        (["--config.model.path=FILES/damaged.safetensors"], ("damaged.safetensors: damaged",)),
        (["--config.model.path=FILES"], ("no manifest.json",)),
        (["--prompts-file=FILES/missing.txt"], ("prompts-file: cannot read", "missing.txt", "No such file")),
        (["--prompts-file=FILES/empty.txt"], ("prompts-file: ", "empty.txt is empty")),
        (["--prompt=one red square", "--prompt=two red sheep"], ("unknown word 'sheep' in prompt 'two red sheep'",)),
        (["--out=gs://bucket/images"], ("out: found 'gs://bucket/images', expected a path on this machine",)),
        (["--prompts-file=gs://bucket/p.txt"], ("prompts-file: found 'gs://bucket/p.txt', expected a path",)),
        (["--adapter=s3://bucket/a.safetensors"], ("adapter: found 's3://bucket/a.safetensors', expected a path",)),
        (["--negative-prompt=a", "--config.eval.guidance=1"], ("negative-prompt: eval.guidance is 1",)),
        (["--config.resolution=24x24"], ("expected pixels a side, like 512, or height,width, like 768,512",)),
        (["--adapter=FILES/missing.safetensors"], ("missing.safetensors", "no such file")),
        (["--adapter=FILES/damaged.safetensors"], ("damaged.safetensors", "damaged")),
        (["--adapter=WEIGHTS/other.safetensors"], ("other.safetensors", "preset 'sd35_medium'")),
        (["--adapter=WEIGHTS/base.safetensors"], ("base.safetensors", "holds no adapter")),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    weights: Path, files: Path, tmp_path: Path, arguments: list[str], fragments: tuple[str, ...]
):
    places = {"FILES": str(files), "WEIGHTS": str(weights)}
    base = f"--config.model.path={weights}/base.safetensors"
    given = [re.sub("FILES|WEIGHTS", lambda match: places[match[0]], argument) for argument in arguments]
    message = _error(tmp_path / "out", base, *given)
    for fragment in fragments:
        assert fragment in message


def test_a_config_file_that_is_not_there_is_one_line(tmp_path: Path):
    assert "missing.py" in _error(tmp_path / "out", f"--config={tmp_path}/missing.py")


def test_a_place_that_cannot_be_written_is_one_line(weights: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    base = f"--config.model.path={weights}/base.safetensors"
    assert f"out: {tmp_path}/file is a file" in _error(tmp_path / "file", base)
    assert f"out: {tmp_path}/file is no folder" in _error(tmp_path / "file" / "out", base)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_things_is_not_written_into(run: Run, whole: list[Path], weights: Path, tmp_path: Path):
    base, mine = f"--config.model.path={weights}/base.safetensors", tmp_path / "mine"
    mine.mkdir()
    Image.new("RGB", (8, 8)).save(mine / "00000.png")  # a photo of someone who counts like us
    before = (mine / "00000.png").read_bytes()
    expected = f"error: out: {mine} holds 00000.png, which sampling has not made: name another, or --force"
    assert _said(lambda: _call(base, f"--out={mine}")) == [expected]
    assert [path.read_bytes() for path in mine.iterdir()] == [before]
    run(mine, *_flags(PROMPTS[0]), "--force", num_steps=1, guidance=1.0)
    assert (mine / "00000.png").read_bytes() != before
    (mine / "notes.txt").touch()
    assert "mine holds notes.txt, which" in _said(lambda: _call(base, f"--out={mine}"))[0]


def test_the_base_alone_is_told_from_what_was_trained(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "miniature").mkdir(parents=True)
    (tmp_path / "runs" / "miniature" / "student.safetensors").touch()
    run(Path("out"), *_flags(PROMPTS[0]), num_steps=1, guidance=1.0)
    assert "trained is drawn with --adapter=runs/miniature/student.safetensors\n" in capsys.readouterr().out


def test_images_that_are_not_finite_are_named_and_not_written(run: Run, weights: Path, tmp_path: Path):
    variables, metadata = load_tree(weights / "base.safetensors")
    variables["params"]["proj_out"]["bias"][:] = 3e38  # the sum over steps is beyond float32
    save_tree(tmp_path / "broken.safetensors", variables, metadata)
    broken = f"--config.model.path={tmp_path}/broken.safetensors"
    said = _said(lambda: run(tmp_path / "out", broken, *_flags(*PROMPTS[1:])))
    assert said[-1].endswith(
        "error: images: 2 of 2 are not finite, the first of prompt 'two red squares and one red circle', seed 0"
    )
    assert not list((tmp_path / "out").iterdir())


def test_the_program_ends_with_the_error_and_nothing_else(tmp_path: Path):
    command = [sys.executable, "-m", "fopd_jax.sample", f"--config={CONFIG}", f"--out={tmp_path}/out", "--seed=one"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: flag --seed=one")
