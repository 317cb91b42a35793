"""`python -m fopd_jax.rewards`: what it checks, prints and returns."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl.testing import flagsaver

from fopd_jax.config.flags import read_config
from fopd_jax.config.schema import OPD, RewardConfig, Run, Server
from fopd_jax.exits import BAD_INPUT, RETRY
from fopd_jax.rewards import __main__ as program
from fopd_jax.rewards.cases import objects, ruins, texts
from fopd_jax.rewards.catalogue import CATALOGUE
from fopd_jax.rewards.registry import KINDS
from fopd_jax.worlds.miniature.cases import cases_of
from fopd_jax.worlds.miniature.world import make_world

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "miniature.py"
HERE = f"{__name__}:"


def brightness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    return images.mean((1, 2, 3)) / 255


def ranks(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """As bright as the batch's own: no score of an image."""
    return brightness(images, prompts, metadata) / brightness(images, prompts, metadata).max()


SEEN: list[tuple[tuple[int, ...], list[str]]] = []


def remember(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    SEEN.append((images.shape, sorted(prompts)))
    return brightness(images, prompts, metadata)


def call(*arguments: str, config: Path | None = CONFIG) -> None:
    """What the program does, in this process."""
    argv = ["fopd_jax.rewards", *arguments[:1], *([] if config is None else [f"--config={config}"]), *arguments[1:]]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for the config's fields
        program.main(program._parse(argv))


def fails(*arguments: str, config: Path | None = CONFIG) -> int:
    with pytest.raises(SystemExit) as caught:
        call(*arguments, config=config)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_rewards_of_the_tasks_prove_themselves(capsys: pytest.CaptureFixture[str]):
    """The config's tasks name them; the miniature's own have the miniature's pictures."""
    call("check", "--config.tasks.text.rewards.text=1", "--config.tasks.text.rewards.quality=0",
         "--config.tasks.composition.rewards.composition_strict=1")  # fmt: skip
    lines = capsys.readouterr().out.split("\n")
    rows = [line for line in lines if line.endswith("yes")]
    cells = [re.split(r"\s{2,}", row) for row in rows]
    assert ["text", "the right text > one wrong glyph", "1", "0.6667", "yes"] in cells
    assert {row.split()[0] for row in rows} == {"text", "quality", "composition_strict"}
    assert len(rows) == 2 + 1 + 2 + 3 * 4
    assert sum("s for one image alone" in line for line in lines) == 3


def test_rewards_can_be_named(capsys: pytest.CaptureFixture[str]):
    call("check", "--reward=jpeg_compressibility,small", "--config.rewards.small.kind=jpeg_compressibility",
         "--config.rewards.small.options.quality=30")  # fmt: skip
    out = capsys.readouterr().out
    for name in ("jpeg_compressibility", "small"):
        assert re.search(rf"^{name} +mountains > noise .* yes$", out, re.MULTILINE)


def test_a_function_of_ones_own_is_tried_on_the_tasks_prompts(capsys: pytest.CaptureFixture[str]):
    SEEN.clear()
    call("check", "--config.tasks.composition.rewards.mine=1", f"--config.rewards.mine.kind={HERE}remember")
    assert "mine" in capsys.readouterr().out
    shape, prompts = SEEN[0]
    assert shape == (4, 24, 24, 3)
    assert len(set(prompts)) == 2
    assert all(re.search("square|circle|triangle", prompt) for prompt in prompts)


def test_what_a_reward_must_know_is_that_of_its_kind_wherever_it_runs():
    rewards = {
        "signs": RewardConfig(kind="ocr"), "served": RewardConfig(kind="remote", options={"reward": "geneval"}),
        "ocr": RewardConfig(kind="remote"), "mine": RewardConfig(kind="package.module:function"),
    }  # fmt: skip
    config = OPD(rewards=rewards, run=Run(servers={"quality": Server(urls=("http://127.0.0.1:1",))}))
    names, world = [*rewards, "text", "quality", "deqa"], make_world()
    found = {name: {case.name for case in program._cases(config, name, world)} for name in names}
    assert found["signs"] == found["ocr"] == {case.name for case in texts()}
    assert found["served"] == {case.name for case in objects()}
    assert found["mine"] == set()
    for name in ("text", "quality"):
        assert found[name] == {case.name for case in cases_of(name)}
    assert found["deqa"] == {case.name for case in ruins()}


def test_prompts_and_what_stands_beside_them_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def score(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
        seen.append((images.shape, prompts, metadata))
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(sys.modules[__name__], "remember", score)
    file = tmp_path / "test.jsonl"
    file.write_text('{"prompt": "a cat", "metadata": {"a": 1}}\n{"prompt": "a dog", "metadata": {"a": 2}}\n')
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "from fopd_jax.config.schema import OPD, Model, RewardConfig, RoutedTask\n"
        "def get_config():\n"
        f"    task = RoutedTask(test={str(file)!r}, rewards={{'mine': 1.0}})\n"
        f"    mine = RewardConfig(kind={HERE + 'remember'!r})\n"
        "    return OPD(name='a', model=Model(preset='sd35_medium'), tasks={'cats': task}, rewards={'mine': mine})\n"
    )
    call("check", config=experiment)
    shape, prompts, metadata = seen[0]
    assert shape == (8, 512, 512, 3)
    assert prompts == ["a cat", "a cat", "a dog", "a dog"] * 2
    assert metadata == ([{"a": 1}] * 2 + [{"a": 2}] * 2) * 2


def test_a_reward_that_cannot_be_trusted_ends_with_1_and_a_line(capsys: pytest.CaptureFixture[str]):
    code = fails("check", "--config.tasks.text.rewards.mine=1", f"--config.rewards.mine.kind={HERE}ranks")
    assert code == RETRY
    out, err = capsys.readouterr()
    assert re.search(r"^mine +and without their neighbours +NO: one image scores", out, re.MULTILINE)
    assert err.startswith("error: rewards that cannot be trusted: mine (1 of 4 do not hold, such as and without")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["check"],
            "error: tasks: none names a reward; expected some, as --config.tasks.NAME.rewards.ocr=1",
        ),
        (["check", "--reward=orc"], "error: rewards.orc.kind: no reward 'orc'; did you mean 'ocr'?"),
        (
            ["check", "--reward=jpeg_compressibility", "--config.rewards.jpeg_compressibility.options.quality=0"],
            "error: rewards.jpeg_compressibility.options.quality: found 0, expected 1 to 95",
        ),
        (["prove"], "error: found 'prove', expected one of check, list, then flags; --help says more"),
        ([], "error: found '--config="),
        (["check", "all"], "error: unexpected arguments ['all']"),
        (["list", "--reward=ocr"], "error: list: found --config="),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]):
    assert fails(*arguments) == BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith(problem)
    assert err.count("\n") == 1


def test_the_list_is_that_of_the_registry(capsys: pytest.CaptureFixture[str]):
    assert fails("list", config=None) == 0
    heads, *rows = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", heads) == ["kind", "runs on", "values", "extra", "weights", "measures"]
    assert [row.split()[0] for row in rows] == list(CATALOGUE)
    assert CATALOGUE.keys() == KINDS.keys()


def test_rewards_are_closed_even_if_one_cannot_be_made(monkeypatch: pytest.MonkeyPatch):
    closed: list[Any] = []
    monkeypatch.setattr(program, "close_all", lambda rewards: closed.append(list(rewards)))
    monkeypatch.setattr(program, "prove", lambda *_: (_ for _ in ()).throw(KeyError("bug")))
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        argv = ["fopd_jax.rewards", "check", f"--config={CONFIG}"]
        patch.setattr(sys, "argv", argv)
        program._parse(argv)
        with pytest.raises(KeyError, match="bug"):
            program.check(read_config(), ["text"])
    assert closed == [["text"]]


def test_help_is_there_at_once():
    """Nothing that takes long is imported: Python says what was."""
    command = [sys.executable, "-X", "importtime", "-m", "fopd_jax.rewards", "check", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("`python -m fopd_jax.rewards check --config=")
    assert "\n  --reward " in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "PIL", "orbax"}
