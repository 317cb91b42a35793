"""The program from flags to results, on random weights: outputs, kills, extensions, bad input."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from fopd_jax.adapters.lora import Adapter, delta, init_adapter
from fopd_jax.backbones.weights import init_variables
from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import assign, resolve, thaw
from fopd_jax.config.schema import LoRAConfig
from fopd_jax.evaluation import sampler
from fopd_jax.interop.files.safetensors import load_adapter, load_tree, save_adapter, save_tree
from fopd_jax.interop.sd3.network import TARGETS
from fopd_jax.models.mmdit import PRESETS, MMDiT
from fopd_jax.running import loop
from fopd_jax.running.checkpoints import Checkpoints, newest_step
from fopd_jax.running.metrics import MetricWriter
from fopd_jax.steps.opd import step as opd_step
from fopd_jax.worlds.miniature.world import make_world
from tests.configs import load, options, prepare

Overrides = dict[str, Any]
CONFIGS = Path(__file__).parents[1] / "configs"
RANK, STEPS = 4, 4
TIMEOUT = 600.0  # seconds; compiling on a busy machine takes minutes
TINY: Overrides = {
    "seed": 3, "steps": STEPS, "log_every": 1, "checkpoint_every": 1, "eval_every": 2, "keep_checkpoints": 2,
    "model.preset": "miniature", "model.dtype": "float32", "batch_size": 4, "images_per_prompt": 1,
    "sampler.num_steps": 3, "adapter.rank": RANK, "adapter.alpha": 2.0 * RANK, "adapter.targets": ("attn",),
    "optimizer.learning_rate": 1e-2, "optimizer.warmup": 2, "final_samples": 6,
    "eval.samples": 4, "eval.batch_size": 4, "eval.num_steps": 2, "eval.guidance": 1.0, "guidance": 1.0,
}  # fmt: skip
OUTPUTS = {
    "config.json", "goodput.json", "metrics.jsonl", "results.json", "samples.png", "student.safetensors", "table.txt",
    "timing.json",
}  # fmt: skip
CLOCKED = {"goodput.json", "timing.json"}


# ---- a tiny experiment


def _noisy(seed: int, tree: Any, std: float) -> Any:
    """Every leaf plus noise: a fresh network's gates are zero, and no adapter would have any effect."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [np.asarray(leaf) + std * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


def _load(name: str = "miniature", *variant: str) -> Any:
    """A config of the repository."""
    return load(name, *variant)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random base and random experts: every teacher of the config, and its anchor."""
    folder, preset = tmp_path_factory.mktemp("weights"), {"preset": "miniature"}
    shape = make_world().latent_shape
    variables = _noisy(0, jax.jit(lambda: init_variables(MMDiT(PRESETS["miniature"]), shape, 0))(), 0.05)
    save_tree(folder / "base.safetensors", variables, preset)
    for seed, name in enumerate(_experts(), start=1):
        fresh = init_adapter(jax.random.key(seed), variables["params"], LoRAConfig(RANK, 2.0 * RANK), TARGETS)
        save_adapter(folder / f"{name}.safetensors", _noisy(seed, fresh, 0.05), preset)
    return folder


def _experts() -> list[str]:
    config = _load()
    return [*config.tasks, config.anchor.name]


def _overrides(weights: Path) -> Overrides:
    *teachers, anchor = _experts()
    adapters = {f"tasks.{name}.teacher": f"{weights}/{name}.safetensors" for name in teachers}
    files = {"model.path": f"{weights}/base.safetensors", "anchor.adapter": f"{weights}/{anchor}.safetensors"}
    return TINY | adapters | files


@pytest.fixture
def config(weights: Path) -> Any:
    config = _load()
    assign(config, _overrides(weights))
    return config


# ---- running it


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One CPU device; compiled programs are shared between the processes of this module."""
    cache = tmp_path_factory.mktemp("compiled")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def _command(workdir: Path, overrides: Overrides, path: Path = CONFIGS / "miniature.py") -> list[str]:
    flags = options(overrides)
    return [sys.executable, "-m", "fopd_jax.main", f"--config={path}", f"--workdir={workdir}", *flags]


class Program:
    """Runs the program in `folder` with one set of overrides."""

    def __init__(self, folder: Path, environment: dict[str, str], overrides: Overrides) -> None:
        self.folder, self.environment, self.overrides = folder, environment, overrides

    def run(self, name: str, **changes: Any) -> Path:
        """To the end; returns the workdir."""
        done = self.call(_command(self.folder / name, self.overrides | changes))
        assert done.returncode == 0, done.stderr
        (self.folder / f"{name}.out").write_text(done.stdout)
        return self.folder / name

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )

    def start(self, name: str, *flags: str, **changes: Any) -> subprocess.Popen[str]:
        command = _command(self.folder / name, self.overrides | changes) + list(flags)
        with (self.folder / f"{name}.err").open("a") as errors:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors, text=True
            )

    def kill(self, name: str, when: Callable[[Path], bool], **changes: Any) -> bool:
        """Start it, kill it outright as soon as `when(workdir)` holds; False if it ended before that."""
        with self.start(name, **changes) as process:
            alive = _await([process], lambda: when(self.folder / name))
            process.kill()
        return alive

    def kill_one_of_two(self, name: str, when: Callable[[Path], bool], victim: int, **changes: Any) -> bool:
        """The same for two processes, of which one dies; the other is given up, as a job manager would."""
        processes = self.start_two(name, **changes)
        alive = _await(processes, lambda: when(self.folder / name))
        processes[victim].kill()
        time.sleep(1)
        for process in processes:
            process.kill()
            process.wait()
        return alive

    def start_two(self, name: str, **changes: Any) -> list[subprocess.Popen[str]]:
        with socket.create_server(("localhost", 0)) as free:
            flags = [f"--coordinator=localhost:{free.getsockname()[1]}", "--num-processes=2"]
        return [self.start(name, *flags, f"--process-id={process}", **changes) for process in range(2)]


def _await(processes: list[subprocess.Popen[str]], condition: Callable[[], bool]) -> bool:
    """Until the condition holds; False if a process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.002)
    return True


@pytest.fixture(scope="module")
def program(weights: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("runs"), environment, _overrides(weights))


@pytest.fixture(scope="module")
def whole(program: Program) -> Path:
    """The workdir of a run that nothing interrupted."""
    return program.run("whole")


def _logged(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _same_outcome(found: Path, expected: Path) -> None:
    """Timing apart, everything that a run leaves is the same, byte by byte."""
    for name in OUTPUTS - CLOCKED:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


# ---- a whole run


def test_a_run_leaves_weights_metrics_results_and_pictures(whole: Path, program: Program):
    files = {path.name for path in whole.iterdir()}
    assert files == OUTPUTS | {"checkpoints", "tensorboard"}  # and no temporary file
    assert [line["step"] for line in _logged(whole) if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in _logged(whole) if "train/loss" not in line] == [2, 4]
    assert json.loads((whole / "config.json").read_text())["batch_size"] == 4
    assert json.loads((whole / "timing.json").read_text()).keys() == {
        "setup_seconds", "train_seconds", "report_seconds",
    }  # fmt: skip
    assert (whole / "table.txt").read_text() in (program.folder / "whole.out").read_text()
    with Image.open(whole / "samples.png") as picture:
        assert picture.format == "PNG"
    assert newest_step(whole) == STEPS
    events = b"".join(path.read_bytes() for path in (whole / "tensorboard").iterdir())
    assert events.count(b"\x89PNG") == 3  # what each of the two evaluations drew, and the report


def test_the_results_compare_base_teachers_merge_and_student(whole: Path):
    results = json.loads((whole / "results.json").read_text())
    teachers = [f"teacher/{name}" for name in _experts()]
    assert set(results["models"]) == {"base", "merge", "student", *teachers}
    assert (results["steps"], results["seed"]) == (STEPS, 3)
    assert results["samples"]["quality"] == 12  # both tasks
    assert all(np.isfinite(value) for scores in results["models"].values() for value in scores.values())


def test_the_student_has_moved_from_the_merge_and_loads_as_an_adapter(whole: Path, config: Any, tmp_path: Path):
    student, metadata = load_adapter(whole / "student.safetensors")
    start = prepare(config, tmp_path / "run").teaching.start
    assert metadata["preset"] == "miniature"
    assert student.scale == start.scale
    before, after = (flatten_dict(tree, sep="/") for tree in (start.weights, student.weights))
    assert before.keys() == after.keys()
    still = {path for path in before if np.abs(before[path] - after[path]).max() < 1e-4}
    # The last block reads the text's keys and values only, so nothing depends on its queries.
    assert still == {"last_block/attn/add_q_proj/a", "last_block/attn/add_q_proj/b"}


# ---- kills and extensions


def test_a_killed_run_ends_like_one_that_nothing_interrupted(program: Program, whole: Path):
    assert program.kill("killed", lambda workdir: len(_logged(workdir)) >= 2)
    assert not (program.folder / "killed" / "results.json").exists()
    _same_outcome(program.run("killed"), whole)


@pytest.mark.slow
def test_kills_in_every_phase_change_nothing(program: Program, whole: Path):
    """While a checkpoint is being written, between steps, in the report, and at times that nobody chose."""
    phases: list[Callable[[Path], bool]] = [
        lambda workdir: (workdir / "config.json").exists(),
        lambda workdir: any((workdir / "checkpoints").glob("*tmp*")),
        lambda workdir: newest_step(workdir) >= 2,
        lambda workdir: any(line["step"] == STEPS for line in _logged(workdir)),
        lambda workdir: (workdir / "student.safetensors").exists(),
        lambda workdir: (workdir / "results.json").exists(),
    ]
    for phase in phases:
        assert program.kill("phases", phase)
    _same_outcome(program.run("phases"), whole)
    rng = np.random.default_rng(0)
    for _ in range(3):
        until = time.monotonic() + rng.uniform(3, 20)
        program.kill("random", lambda _, until=until: time.monotonic() > until)
    _same_outcome(program.run("random"), whole)


def test_a_run_told_to_stop_saves_in_time(program: Program):
    """30 s is what clouds give; the second signal is the one that impatient job managers send."""
    workdir = program.folder / "stopped"
    with program.start("stopped", steps=10_000, eval_every=0, checkpoint_every=1000) as process:
        assert _await([process], lambda: len(_logged(workdir)) >= 2)
        process.terminate()
        began = time.monotonic()
        time.sleep(0.1)
        process.terminate()
        assert process.wait(TIMEOUT) in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter if it has already saved
        seconds = time.monotonic() - began
    assert newest_step(workdir) == max(line["step"] for line in _logged(workdir)) > 0
    assert seconds < 30, seconds


LONG: Overrides = {"steps": 40, "eval_every": 10}


def _moment(rng: np.random.Generator, newest: int) -> Callable[[Path], bool]:
    """When to kill: while a checkpoint is being written, some time after the next one, or at any time at all."""
    kind, delay, later = rng.integers(3), rng.uniform(0, 2), time.monotonic() + rng.uniform(0, 20)
    seen: list[float] = []

    def after_a_save(workdir: Path) -> bool:
        if not seen and (newest_step(workdir) > newest or (workdir / "results.json").exists()):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + delay

    def in_a_save(workdir: Path) -> bool:
        return any((workdir / "checkpoints").glob("*tmp*"))

    return [in_a_save, after_a_save, lambda workdir: time.monotonic() > later][kind]


def _kill_often(kills: int, workdir: Path, kill: Callable[[Callable[[Path], bool]], bool]) -> None:
    """As many kills of one run; a run that ends in between is started again, as any other."""
    rng, done, newest = np.random.default_rng(0), 0, 0
    while done < kills:
        done += kill(_moment(rng, newest))
        assert newest_step(workdir) >= newest  # no checkpoint is ever lost
        newest = newest_step(workdir)


@pytest.mark.slow
def test_thirty_random_kills_change_nothing(program: Program):
    expected = program.run("uninterrupted", **LONG)
    _kill_often(30, program.folder / "thirty", lambda when: program.kill("thirty", when, **LONG))
    _same_outcome(program.run("thirty", **LONG), expected)


@pytest.mark.slow
def test_ten_kills_of_one_of_two_processes_change_nothing(program: Program):
    def to_the_end(name: str) -> Path:
        assert [process.wait(TIMEOUT) for process in program.start_two(name, **LONG)] == [0, 0]
        return program.folder / name

    expected, victims = to_the_end("pair"), itertools.cycle((1, 0))
    _kill_often(10, program.folder / "ten", lambda when: program.kill_one_of_two("ten", when, next(victims), **LONG))
    _same_outcome(to_the_end("ten"), expected)


def test_a_finished_run_can_be_extended(program: Program, whole: Path):
    short = program.run("extended", steps=2)
    assert json.loads((short / "results.json").read_text())["steps"] == 2
    _same_outcome(program.run("extended"), whole)


@pytest.mark.slow
def test_a_finished_run_repeats_only_its_report(program: Program, whole: Path):
    before = {name: (whole / name).read_bytes() for name in OUTPUTS - CLOCKED}
    program.run("whole")
    assert {name: (whole / name).read_bytes() for name in before} == before


# ---- bad input, as a user meets it


def _one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.nope=1"], "no such field: 'nope'"),
        (["--config.eval.sample=1", "--config.steps=1"], "'sample' Did you mean \"samples\""),
        (["--config.steps=many"], "'many'"),
        (["--config.steps=-1"], "steps: found -1, expected at least 0"),
    ],
)
def test_bad_flags_are_one_line(program: Program, flags: list[str], message: str, tmp_path: Path):
    command = _command(tmp_path / "run", {}) + flags
    assert message in _one_error(program.call(command))
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_not_there_is_one_line(program: Program, tmp_path: Path):
    missing = tmp_path / "missing.py"
    for overrides in ({}, {"steps": 1}):
        assert str(missing) in _one_error(program.call(_command(tmp_path / "run", overrides, missing)))
    assert not (tmp_path / "run").exists()


def test_an_unknown_variant_of_a_config_is_one_line(program: Program, tmp_path: Path):
    path = CONFIGS / "miniature_teacher.py:beauty"
    assert "found skill 'beauty'" in _one_error(program.call(_command(tmp_path / "run", {}, path)))


def test_a_prompt_without_a_teacher_is_one_line(program: Program, tmp_path: Path):
    path = tmp_path / "incomplete.py"
    path.write_text(
        "import runpy\n\n\ndef get_config():\n"
        f"    c = runpy.run_path({str(CONFIGS / 'miniature.py')!r})['get_config']()\n"
        "    c.tasks.composition.teacher = ''\n    return c\n"
    )
    overrides = {name: value for name, value in program.overrides.items() if "composition" not in name}
    error = _one_error(program.call(_command(tmp_path / "run", overrides, path)))
    assert re.search(r"prompt '.*': its task 'composition' has no teacher; teachers: \('text',\)", error)
    assert not (tmp_path / "run").exists()


# ---- bad input, in one process


@pytest.fixture
def no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update and the sampler are not even traced."""

    def traced(*args: Any) -> None:
        raise AssertionError("traced before the input was checked")

    monkeypatch.setattr(opd_step, "fused", traced)
    monkeypatch.setattr(opd_step, "replay", traced)
    monkeypatch.setattr(sampler, "sample_final", traced)


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(config: Any, folder: Path, *fragments: str) -> None:
    """One line with every fragment, and a folder that is as it was."""
    before, there = _snapshot(folder), folder.exists()
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        prepare(config, folder)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    assert folder.exists() == there
    assert _snapshot(folder) == before


SCALARS: list[tuple[Overrides, tuple[str, ...]]] = [
    ({"stage": "grpo"}, ("stage: found 'grpo'", "'opd'")),
    ({"model.preset": "sd35_tiny"}, ("model.preset: found 'sd35_tiny'", "'miniature'")),
    ({"model.preset": "sd35_medium"}, ("model.path: found", "'sd35_medium' needs a converted folder")),
    ({"steps": -1}, ("steps: found -1",)),
    ({"log_every": 0}, ("log_every: found 0",)),
    ({"checkpoint_every": 0}, ("checkpoint_every: found 0",)),
    ({"eval_every": -1}, ("eval_every: found -1",)),
    ({"keep_checkpoints": 0}, ("keep_checkpoints: found 0",)),
    ({"batch_size": 0}, ("batch_size", "found 0")),
    ({"images_per_prompt": 3}, ("images_per_prompt", "found 4, 3")),
    ({"minibatches": 3}, ("minibatches: found 3", "batch_size 4")),
    ({"updates_per_rollout": 0}, ("updates_per_rollout: found 0",)),
    ({"sampler.num_steps": 1}, ("num_steps: found 1",)),
    ({"sampler.transition": "euler"}, ("'euler'", "sde")),
    ({"sampler.transition": "ode", "objective.name": "clipped", "objective.weighting": "ode"}, ("'ode'",)),
    ({"objective.name": "ppo"}, ("objective.name: found 'ppo'",)),
    ({"adapter.rank": 0}, ("adapter.rank: found 0",)),
    ({"adapter.targets": ("attn3",)}, ("adapter.targets", "attn3")),
    ({"tasks.text.weight": 0.0, "tasks.composition.weight": 0.0}, ("tasks", "[0.0, 0.0]")),
    ({"tasks.text.weight": -1.0}, ("tasks", "[1.0, -1.0]")),
    ({"eval.samples": 0}, ("eval.samples", "found 0")),
    ({"eval.batch_size": 0}, ("eval.batch_size", "0")),
    ({"eval.num_steps": 0}, ("num_steps: found 0",)),
    ({"eval.tasks": ("text", "ocr")}, ("tasks: found 'ocr'", "'composition'")),
    ({"final_samples": 0}, ("final_samples: found 0",)),
    ({"cold_start.method": "sft"}, ("cold_start.method: found 'sft'",)),
    ({"cold_start.merge": "mean"}, ("cold_start.merge: found 'mean'",)),
    ({"eval.transition": "euler"}, ("'euler'", "sde")),
    ({"eval.transition": "cps", "eval.noise_level": 1.5}, ("noise_level: found 1.5", "'cps'")),
    ({"model.attention": "flash"}, ("'flash'",)),
    ({"model.dtype": "float33"}, ("model.dtype: found 'float33'",)),
    ({"model.remat": "some"}, ("model.remat: found 'some'", "'dots'")),
    ({"mesh.tensor": 3}, ("mesh", "'tensor': 3", "devices")),
    ({"anchor.name": "text"}, ("anchor.name: found 'text'", "another teacher")),
]


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(("changes", "fragments"), SCALARS, ids=lambda value: str(value)[:60])
def test_values_out_of_range_are_named(config: Any, tmp_path: Path, changes: Overrides, fragments: tuple[str, ...]):
    assign(config, changes)
    _refused(config, tmp_path / "run", *fragments)


@pytest.mark.usefixtures("no_compilation")
def test_a_task_without_a_teacher_is_named_with_a_prompt(config: Any, tmp_path: Path):
    config.tasks.composition.teacher = ""
    prompt = make_world().tasks["composition"].train[0]
    _refused(config, tmp_path / "run", repr(prompt), "'composition' has no teacher", "('text',)")


@pytest.mark.usefixtures("no_compilation")
def test_merge_weights_for_nobody_are_named(config: Any, tmp_path: Path):
    config.cold_start.weights["aesthetics"] = 0.5
    _refused(config, tmp_path / "run", "cold_start.weights", "aesthetics", "'composition'")


def _other_adapter(path: Path, weights: Path, lora: LoRAConfig, preset: str = "miniature") -> str:
    variables, _ = load_tree(weights / "base.safetensors")
    save_adapter(path, init_adapter(jax.random.key(0), variables["params"], lora, TARGETS), {"preset": preset})
    return str(path)


def _teach(config: Any, expert: str, path: str) -> str:
    """Give an expert another file; returns its name."""
    name = config.anchor.name if expert == "anchor" else next(iter(config.tasks))
    assign(config, {"anchor.adapter" if expert == "anchor" else f"tasks.{name}.teacher": path})
    return name


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("expert", ["teacher", "anchor"])
@pytest.mark.parametrize(
    ("lora", "fragments"),
    [
        (LoRAConfig(RANK, 8.0, ("attn2",)), ("adapts dual_blocks/attn2/", "adapter.targets leaves that layer out")),
        (LoRAConfig(RANK, 8.0, ("attn", "mlp")), ("/ff/", "adapter.targets leaves that layer out")),
    ],
)
def test_an_adapter_of_a_layer_that_the_student_lacks_is_named_with_file_and_layer(
    config: Any, weights: Path, tmp_path: Path, expert: str, lora: LoRAConfig, fragments: tuple[str, ...]
):
    name = _teach(config, expert, _other_adapter(tmp_path / "other.safetensors", weights, lora))
    _refused(config, tmp_path / "run", name, "other.safetensors", *fragments)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("expert", ["teacher", "anchor"])
def test_an_adapter_of_another_shape_is_named_with_file_and_layer(
    config: Any, weights: Path, tmp_path: Path, expert: str
):
    adapter, metadata = load_adapter(weights / "text.safetensors")
    layer = adapter.weights["last_block"]["attn"]["to_q"]
    layer["a"] = layer["a"][:-1]
    save_adapter(tmp_path / "other.safetensors", adapter, metadata)
    name = _teach(config, expert, f"{tmp_path}/other.safetensors")
    fragments = "last_block/attn/to_q/a", f"found shape (127, {RANK})", "expected (128,)"
    _refused(config, tmp_path / "run", name, "other.safetensors", *fragments)


@pytest.mark.usefixtures("no_compilation")
def test_teachers_of_other_ranks_and_fewer_layers_teach_what_they_taught(config: Any, weights: Path, tmp_path: Path):
    """The bank takes the largest rank and the student's layers; each teacher's update stays its own."""
    variables, _ = load_tree(weights / "base.safetensors")
    shapes = {"text": LoRAConfig(RANK - 1, 8.0), "composition": LoRAConfig(RANK + 2, 3.0, ("attn", "attn2"))}
    for seed, (name, lora) in enumerate(shapes.items()):
        adapter = _noisy(seed, init_adapter(jax.random.key(seed), variables["params"], lora, TARGETS), 0.05)
        save_adapter(tmp_path / f"{name}.safetensors", adapter, {"preset": "miniature"})
        config.tasks[name].teacher = f"{tmp_path}/{name}.safetensors"
    config.adapter.targets = ("attn", "attn2", "mlp")
    stage = prepare(config, tmp_path / "run")
    bank = flatten_dict(stage.frozen.bank, sep="/")
    assert {leaf.shape[-1] for path, leaf in bank.items() if path.endswith("/a")} == {RANK + 2}
    trained = flatten_dict(stage.teaching.start.weights)
    assert {leaf.shape[-1] for path, leaf in trained.items() if path[-1] == "a"} == {RANK}
    # Nobody adapts the feed-forwards, and yet the student can.
    assert all(leaf.any() for path, leaf in trained.items() if path[-1] == "a")
    files = [tmp_path / "composition.safetensors", tmp_path / "text.safetensors", weights / "quality.safetensors"]
    for k, file in enumerate(files):  # the tasks' order, which is the alphabet's, then the anchor
        expected = flatten_dict(delta(load_adapter(file)[0]), sep="/")
        found = {
            path[:-2]: bank[path][..., k, :, :] @ bank[f"{path[:-1]}b"][..., k, :, :]
            for path in bank
            if path.endswith("/a")
        }
        assert expected.keys() < found.keys()
        for path, update in found.items():
            np.testing.assert_allclose(update, expected.get(path, np.zeros_like(update)), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("no_compilation")
def test_weights_of_another_preset_are_named(config: Any, weights: Path, tmp_path: Path):
    variables, _ = load_tree(weights / "base.safetensors")
    save_tree(tmp_path / "base.safetensors", variables, {"preset": "sd35_medium"})
    lora = LoRAConfig(RANK, 2.0 * RANK)
    adapter = _other_adapter(tmp_path / "adapter.safetensors", weights, lora, "sd35_large")
    for field, path, preset in (
        ("model.path", f"{tmp_path}/base.safetensors", "sd35_medium"),
        ("tasks.text.teacher", adapter, "sd35_large"),
    ):
        changed = thaw(config)
        assign(changed, {field: path})
        _refused(changed, tmp_path / "run", path, f"'{preset}'", "'miniature'")


@pytest.mark.usefixtures("no_compilation")
def test_base_weights_of_other_shapes_are_named_with_the_tensor(config: Any, weights: Path, tmp_path: Path):
    variables, metadata = load_tree(weights / "base.safetensors")
    variables["params"]["proj_out"]["bias"] = np.zeros(7, np.float32)
    path = tmp_path / "base.safetensors"
    save_tree(path, variables, metadata)
    config.model.path = str(path)
    _refused(config, tmp_path / "run", str(path), "params/proj_out/bias", "found (7,)", "expected (48,)")


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("field", ["model.path", "tasks.text.teacher", "anchor.adapter"])
def test_weights_that_are_missing_or_damaged_are_named(config: Any, weights: Path, tmp_path: Path, field: str):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((weights / "base.safetensors").read_bytes()[:5000])
    for path, problem in ((str(damaged), "damaged"), ("packaged:nothing.safetensors", "no such file")):
        assign(config, {field: path})
        _refused(config, tmp_path / "run", path.removeprefix("packaged:"), problem)


def test_a_workdir_of_another_config_is_left_alone(config: Any, tmp_path: Path):
    folder = tmp_path / "run"
    prepare(config, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = _snapshot(folder)
    assign(config, {"seed": 4, "optimizer.learning_rate": 0.5})
    with pytest.raises(ValueError, match="belongs to another config") as error:
        prepare(config, folder)
    assert "seed: 3 there, 4 here" in str(error.value)
    assert "optimizer.learning_rate: 0.01 there, 0.5 here" in str(error.value)
    assert _snapshot(folder) == before


def test_bad_input_does_not_touch_a_workdir_in_use(config: Any, tmp_path: Path):
    folder = tmp_path / "run"
    prepare(config, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    config.run.steps = -1
    _refused(config, folder, "steps: found -1")


def test_fewer_steps_than_the_checkpoint_has_are_refused(config: Any, tmp_path: Path):
    folder = tmp_path / "run"
    prepare(config, folder)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # not whole
    config.run.steps = 2
    _refused(config, folder, "steps: found 2", str(folder), "step 3")
    config.run.steps = 3
    prepare(config, folder)


# ---- the other stage


def _train(config: Any, folder: Path) -> Any:
    """What `main` does, in this process."""
    stage = prepare(config, folder)
    stage.describe()
    checkpoints = Checkpoints(folder, config.run.keep_checkpoints, config_hash=config_hash(config))
    writer = MetricWriter(folder, 0)
    with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
        state = loop.run(stage, resolve(config).run, checkpoints, writer)
    checkpoints.close()
    stage.finish(state)
    writer.close()
    return stage


def test_a_teacher_is_trained_and_can_be_taught_from(config: Any, weights: Path, tmp_path: Path):
    teacher = _load("miniature_teacher", "text")
    shared = {name: value for name, value in TINY.items() if name.startswith(("seed", "adapter", "eval.", "optimizer"))}
    sizes = {"steps": 1, "log_every": 1, "checkpoint_every": 1, "eval_every": 0, "data.batch_size": 2}
    assign(teacher, shared | sizes | {"model.path": f"{weights}/base.safetensors"})
    _train(teacher, tmp_path / "teacher")
    adapter, metadata = load_adapter(tmp_path / "teacher" / "adapter.safetensors")
    assert isinstance(adapter, Adapter)
    assert metadata["preset"] == "miniature"
    assert adapter.scale == 2.0
    config.tasks.text.teacher = f"{tmp_path}/teacher/adapter.safetensors"
    prepare(config, tmp_path / "student")


def test_what_trains_must_be_known(weights: Path, tmp_path: Path):
    teacher = _load("miniature_teacher", "text")
    assign(teacher, {"model.path": f"{weights}/base.safetensors", "trained": "everything"})
    _refused(teacher, tmp_path / "run", "trained: found 'everything'", "'params'", "'adapter'")


def _dtypes(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_only_what_is_frozen_is_rounded(config: Any, weights: Path, tmp_path: Path):
    """`model.dtype` is that of base and bank; what trains stays in float32, exactly as its file has it."""
    config.model.dtype = "bfloat16"
    stage = prepare(config, tmp_path / "student")
    assert _dtypes(stage.frozen.variables["params"]) == _dtypes(stage.frozen.bank) == {"bfloat16"}
    assert _dtypes(stage.start().trained) == _dtypes(stage.start().ema) == {"float32"}

    teacher = _load("miniature_teacher", "text")
    path = f"{weights}/base.safetensors"
    assign(teacher, {"model.path": path, "model.dtype": "bfloat16"})
    stage = prepare(teacher, tmp_path / "adapter")
    assert _dtypes(stage.frozen["params"]) == {"bfloat16"}
    assert _dtypes(stage.start().trained) == {"float32"}

    whole = _load("miniature_pretrain", "mediocre")
    assign(whole, {"model.path": path, "model.dtype": "bfloat16"})
    trained = prepare(whole, tmp_path / "whole").start().trained
    jax.tree.map(np.testing.assert_array_equal, trained, load_tree(weights / "base.safetensors")[0]["params"])


def test_the_other_stage_has_images_of_the_miniature_alone(weights: Path, tmp_path: Path):
    teacher = _load("miniature_teacher", "text")
    assign(teacher, {"model.path": f"{weights}/base.safetensors", "model.preset": "sd35_medium"})
    _refused(teacher, tmp_path / "run", "model.preset: found 'sd35_medium'", "flow_matching", "'miniature'")
