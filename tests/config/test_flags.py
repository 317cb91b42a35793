"""Command lines, as programs read them: what is set, and that every mistake is one line and exit status 2."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.config.flags import spread_values
from fopd_jax.config.load import load_config

ROOT = Path(__file__).parents[2]
MINIATURE = f"--config={ROOT}/configs/miniature.py"
PROGRAM = """
import json
from absl import app
from fopd_jax.config.flags import parse_flags, read_config
from fopd_jax.config.parse import flatten
from fopd_jax.exits import explained

def main(rest):
    with explained():
        print(json.dumps(flatten(read_config())))

app.run(main, flags_parser=parse_flags)
"""


def call(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


def values(*flags: str) -> dict[str, Any]:
    done = call(*flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error_of(*flags: str) -> str:
    """All that a program said that refused its command line."""
    done = call(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr.removeprefix("error: ").removesuffix("\n")


# ---- what can be set


@pytest.mark.parametrize(
    ("text", "value"), [("256", 256), ("768,512", [768, 512]), ("(768, 512)", [768, 512]), ("[768,512]", None)]
)
@pytest.mark.parametrize("name", ["resolution", "model.resolution"])
def test_a_size_is_a_side_or_height_and_width(name: str, text: str, value: Any):
    if value is None:
        assert "height,width" in error_of(MINIATURE, f"--config.{name}={text}")
    else:
        assert values(MINIATURE, f"--config.{name}={text}")["model.resolution"] == value


def test_fields_of_every_type_can_be_set():
    before = values(MINIATURE)
    found = values(
        MINIATURE, "--config.seed=5", "--config.guidance=2", "--config.model.path=a=b:c", "--config.whole_teachers",
        "--config.run.watchdog_abort=true", "--noconfig.one_timestep", "--config.eval.tasks=text",
        "--config.eval.tasks=composition", "--config.adapter.targets=('attn','mlp')",
        "--config.optimizer.betas=(0,0.5)",
        "--config.sampler.window=(1,3)", "--config.sampler.trained=None", "--config.tasks.text.weight=3",
        "--config.run.mesh.data=2", "--config.run.alarms={'loss': (0, 2.5)}", "--config.cold_start.weights.text=1",
        "--config.run.steps", "7", "--config.run.reduce_once=()",
    )  # fmt: skip
    assert {name: value for name, value in found.items() if before.get(name) != value} == {
        "seed": 5, "guidance": 2.0, "model.path": "a=b:c", "whole_teachers": True, "run.watchdog_abort": True,
        "eval.tasks": ["text", "composition"], "adapter.targets": ["attn", "mlp"], "optimizer.betas": [0.0, 0.5],
        "sampler.window": [1, 3], "tasks.text.weight": 3.0, "run.mesh.data": 2, "run.alarms.loss": [0.0, 2.5],
        "cold_start.weights.text": 1.0, "run.steps": 7, "run.reduce_once": [],
    }  # fmt: skip
    assert before.keys() - found.keys() == {"run.alarms.ratio"}


def test_names_of_earlier_versions_set_what_became_of_them():
    found = values(
        MINIATURE, "--config.steps=7", "--config.model.remat=dots", "-config.mesh.fsdp=2", "--config.shift=2.5",
        "--config.conditioning_cache=there", "--config.watchdog_abort", "--config.final_samples=3",
        "--config.alarms.ratio=(0.5,2)",
    )  # fmt: skip
    assert {name: found[name] for name in (
        "run.steps", "run.remat", "run.mesh.fsdp", "model.shift", "run.encoding.cache", "run.watchdog_abort",
        "eval.final_samples", "run.alarms.ratio",
    )} == {
        "run.steps": 7, "run.remat": "dots", "run.mesh.fsdp": 2, "model.shift": 2.5, "run.encoding.cache": "there",
        "run.watchdog_abort": True, "eval.final_samples": 3, "run.alarms.ratio": [0.5, 2.0],
    }  # fmt: skip
    flow = values(f"--config={ROOT}/configs/miniature_teacher.py:quality", "--config.data.tasks.text.share=0.25",
                  "--config.data.batch_size=3", "--config.data.empty_caption=0.5")  # fmt: skip
    assert (flow["tasks.text.share"], flow["batch_size"], flow["empty_caption"]) == (0.25, 3, 0.5)


def test_an_entry_that_a_file_gives_as_an_int_takes_a_float(tmp_path: Path):
    file = write(tmp_path, "return OPD(name='any', cold_start=ColdStart(weights={'a': 1}))")
    assert values(f"--config={file}", "--config.cold_start.weights.a=0.5")["cold_start.weights.a"] == 0.5


def test_rewards_are_named_by_flags_alone():
    before = values(MINIATURE)
    found = values(
        MINIATURE, "--config.tasks.text.rewards={'text': 1}", "--config.tasks.composition.rewards.quality=0.25",
        "--config.tasks.composition.rewards.mine", "2", "--config.rewards.mine.kind=package.module:function",
        "--config.rewards.mine.options.number=3", "--config.rewards.mine.options.share", "0.5",
        "--config.rewards.mine.options.name=a-b", "--config.rewards.mine.options.flag",
        "--noconfig.rewards.mine.options.other", "--config.rewards.mine.options.third=true",
        "--config.run.servers.quality.urls=http://a:1", "--config.run.servers.quality.urls=http://b:1",
        "--config.run.max_failed_rewards=0.5",
    )  # fmt: skip
    changed = {name: value for name, value in found.items() if before.get(name) != value}
    assert changed == {
        "tasks.text.rewards.text": 1.0, "tasks.composition.rewards.quality": 0.25,
        "tasks.composition.rewards.mine": 2.0, "rewards.mine.kind": "package.module:function",
        "rewards.mine.weights": "", "rewards.mine.divide_by": 1.0, "rewards.mine.options.number": 3,
        "rewards.mine.options.share": 0.5, "rewards.mine.options.name": "a-b", "rewards.mine.options.flag": True,
        "rewards.mine.options.other": False, "rewards.mine.options.third": True,
        "run.servers.quality.urls": ["http://a:1", "http://b:1"], "run.servers.quality.token_file": "",
        "run.servers.quality.timeout": 60.0, "run.servers.quality.retries": 3, "run.max_failed_rewards": 0.5,
    }  # fmt: skip
    assert type(changed["rewards.mine.options.number"]) is int


# ---- mistakes in flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.nope=1"], "nope: no such field: 'nope', only name, stage, seed, "),
        (["--config.seed=1", "--config.eval.sample=1"], "eval.sample: no such field: 'sample', did you mean 'sam"),
        (["--config.mesh.nope=1"], "run.mesh.nope: no such field: 'nope', only data, fsdp, tensor"),
        (["--config.tasks.text.nope=1"], "tasks.text.nope: no such field: 'nope', only teacher, "),
        (["--config.tasks.nope.weight=1"], "tasks.nope.weight: no such field: 'nope', only text, composition"),
        (["--config.tasks.items.weight=1"], "tasks.items.weight: no such field: 'items', only text, composition"),
        (["--config.cold_start.weights.nope=1"], "cold_start.weights.nope: no such field: 'nope', only "),
        (["--config.seed.nope=1"], "seed.nope: no such field: 'nope', only a value"),
        (["--config.run..steps=1"], "run..steps: no such field: ''"),
        (["--noconfig.nope"], "nope: no such field: 'nope'"),
        (["--config.eval=build"], "eval: a section is set by its fields: tasks, samples, "),
        (
            ["--config.tasks.text.schedule.5=0"],
            "tasks.text.schedule.5: expected the dict as a whole: --config.tasks.text.schedule=\"{'5': …}\"",
        ),
        (["--config.tasks.text=none"], "tasks.text: a section is set by its fields: teacher, "),
        (["--config.run.steps=many"], "flag --config.run.steps=many: expected a whole number"),
        (["--config.run.steps=1.5"], "flag --config.run.steps=1.5: expected a whole number"),
        (["--config.run.steps=True"], "flag --config.run.steps=True: expected a whole number"),
        (["--config.guidance=much"], "flag --config.guidance=much: expected a number"),
        (["--config.one_timestep=maybe"], "flag --config.one_timestep=maybe: expected true or false"),
        (["--config.run.alarms=3"], "flag --config.run.alarms=3: expected a dict as Python writes it"),
        (["--config.run.alarms={'a'"], "flag --config.run.alarms={'a': expected a dict as Python writes it"),
        (["--config.run.alarms={'a': 3}"], "run.alarms.a: found 3, expected a tuple of 2, each a number"),
        (["--config.tasks={'a': 1}"], "tasks.a: found 1, expected a section RoutedTask"),
        (["--config.guidance=nan"], "guidance: found nan, expected a finite number"),
        (["--config.guidance=1e999"], "guidance: found inf, expected a finite number"),
        (["--config.seed=-1"], "seed: found -1, expected a number in [0, 4294967295]"),
        (["--config.seed=99999999999"], "seed: found 99999999999, expected a number in [0, 4294967295]"),
        (["--config.sampler.window=(1,2,3)"], "sampler.window: found (1, 2, 3), expected a tuple of 2, each a whole "),
        (["--config.sampler.window=(1,x"], "flag --config.sampler.window=(1,x: Error while parsing string: (1,x "),
        (["--config.objective.name=best"], "objective.name: found 'best', expected one of ('direct', 'clipped', 'mi"),
        (["--config.tasks.text.rewards.a.b=1"], "tasks.text.rewards.a.b: no such field: 'a', only a value"),
        (["--config.tasks.nope.rewards.a=1"], "tasks.nope.rewards.a: no such field: 'nope', only text, composition"),
        (["--config.tasks.text.rewards.a=-1"], "tasks.text.rewards: found {'a': -1.0}, expected weights from 0 to"),
        (["--config.tasks.text.rewards.a=b"], "flag --config.tasks.text.rewards.a=b: expected a number"),
        (["--config.tasks.text.rewards={}", "--config.tasks.text.rewards.a=1"], "tasks.text.rewards.a: tasks.text.rew"),
        (["--config.run.alarms.ratio.a=1"], "run.alarms.ratio.a: no such field: 'a', only a value"),
        (["--config.rewards.a.kinds=b"], "rewards.a.kinds: no such field: 'kinds', did you mean 'kind'?"),
        (["--config.rewards.a=b"], "rewards.a: a section is set by its fields: kind, weights, divide_by, options"),
        (["--config.rewards.a.kind=b c"], "rewards.a.kind: found 'b c', expected a known reward's name, package.mod"),
        (["--config.run.servers.a.urls=http://me:word@host"], "run.servers.a.urls: found ('…@host',), expected http"),
        (["--flagfile=/nowhere"], "--flagfile: No such file or directory: '/nowhere'"),
        (["--nope"], "Unknown command line flag 'nope'"),
        (["--learning_rate=1"], "Unknown command line flag 'learning_rate'. Did you mean --config.optimizer.learning_"),
        (["--run.steps=1"], "Unknown command line flag 'run.steps'. Did you mean --config.run.steps ?"),
        (["a", "word"], "unexpected arguments ['a', 'word']"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_in_a_flag_is_one_line(flags: list[str], message: str):
    error = error_of(MINIATURE, *flags)
    assert "\n" not in error
    assert error.startswith(message)


def test_several_bad_values_are_all_told():
    error = error_of(MINIATURE, "--config.seed=-1", "--config.tasks.text.guidance=-1", "--config.run.mesh.data=0")
    assert error.splitlines() == [
        "seed: found -1, expected a number in [0, 4294967295]",
        "run.mesh.data: found 0, expected a length from 1 to 1048576, or -1: the devices that are left",
        "tasks.text.guidance: found -1.0, expected at least 0, at most 100",
    ]


def test_fields_before_the_file_are_refused():
    assert "in argv before a value for --config" in error_of("--config.seed=1", MINIATURE)


# ---- mistakes in files

HEAD = "from fopd_jax.config.schema import OPD, ColdStart\n\n\ndef get_config():\n"


def write(folder: Path, body: str, head: str = HEAD) -> Path:
    file = folder / "config.py"
    file.write_text(f"{head}    {body}\n" if head else f"{body}\n")
    return file


BODIES: dict[str, tuple[str, str, str]] = {
    "nothing": (HEAD, "pass", ", line 4: get_config returned NoneType, expected OPD or FlowMatching or GRPO or "
                "ForwardRL of fopd_jax.config.schema and .learning"),
    "a dict": (HEAD, "return {'name': 'any'}", ", line 4: get_config returned dict, expected OPD or FlowMatching"),
    "a ConfigDict": (HEAD, "import ml_collections; return ml_collections.ConfigDict()",
                     ", line 4: get_config returned ConfigDict, expected OPD or FlowMatching"),
    "a class": (HEAD, "return OPD", ", line 4: get_config returned type, expected OPD or FlowMatching"),
    "an error": (HEAD, "return 1 / 0", ", line 5: ZeroDivisionError: division by zero"),
    "a ValueError": (HEAD, "raise ValueError('this\\nis wrong')", ", line 5: this is wrong"),
    "a TypeError": (HEAD, "return 1 + 'a'", ", line 5: TypeError: unsupported operand"),
    "a KeyError": (HEAD, "return {}['key']", ", line 5: KeyError: 'key'"),
    "an OSError": (HEAD, "return open('nowhere')", ", line 5: FileNotFoundError: [Errno 2] No such file"),
    "an unknown field": (HEAD, "config = OPD(); config.seeds = 3; return config",
                         ", line 5: AttributeError: OPD has no field 'seeds', only name, stage, "),
    "an unknown argument": (HEAD, "return OPD(seeds=3)", ", line 5: TypeError: OPD.__init__() got an unexpected "
                            "keyword argument 'seeds', did you mean 'seed'?"),
    "an unknown argument of stage 1": (
        "", "from fopd_jax.config.learning import OldDecay\ndef get_config():\n    return OldDecay(starts=0)",
        ", line 3: TypeError: OldDecay.__init__() got an unexpected keyword argument 'starts', did you mean 'start'?",
    ),
    "a syntax error": ("", "x = 1\n\ndef get_config(:\n    pass", ", line 3: SyntaxError: invalid syntax"),
    "indentation": ("", "def get_config():\npass", ", line 2: IndentationError: expected an indented block"),
    "a missing import": ("", "import nowhere_at_all", ", line 1: ModuleNotFoundError: No module named 'nowhere"),
    "no function": ("", "x = 1", ": found no function get_config"),
    "no function but a value": ("", "get_config = 1", ": found no function get_config"),
    "an empty file": ("", "", ": found no function get_config"),
    "a null byte": ("", "\0", ": "),
    "an argument more": ("", "def get_config(a):\n    pass", ", line 1: TypeError: get_config() missing 1 required "),
    "another's argument": (HEAD, "return ColdStart(nothing=1)", ", line 5: TypeError: ColdStart.__init__() got an "
                           "unexpected keyword argument 'nothing', only method, merge, weights"),
    "an exception in a file that it imports": (HEAD, "import json; json.loads('{')", ", line 5: JSONDecodeError: "),
    "a leave": ("", "import sys\nsys.exit('no')", ", line 2: SystemExit: no"),
    "a leave in the function": (HEAD, "raise SystemExit(3)", ", line 5: SystemExit: 3"),
    "endless recursion": (HEAD, "return get_config()", ", line 5: RecursionError: maximum recursion"),
    "an error that cannot be told": ("", "class E(Exception):\n    def __str__(self):\n        raise ValueError\n\n\n"
                                     "raise E", ", line 6: E: without a message"),
    "nothing said": (HEAD, "assert False", ", line 5: AssertionError: without a message"),
    "a ValueError that says nothing": (HEAD, "raise ValueError", ", line 5: ValueError: without a message"),
    "what is no Exception": (HEAD, "raise GeneratorExit", ", line 5: GeneratorExit: without a message"),
    "a coroutine": ("", "async def get_config():\n    pass", ", line 1: get_config returned coroutine, expected OPD"),
    "several lines": (HEAD, "raise KeyError('a\\n  b')", ", line 5: KeyError: 'a\\n b'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
def test_a_mistake_in_a_file_is_one_line_with_its_place(kind: str, tmp_path: Path):
    head, body, message = BODIES[kind]
    file = write(tmp_path, body, head)
    error = error_of(f"--config={file}", "--config.seed=1")
    assert "\n" not in error
    assert error.startswith(f"{file}{message}")


BYTES = {
    "an image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "Latin-1": b"x = 'caf\xe9'\n", "UTF-16": "x = 1".encode("utf-16"),
    "an archive": b"PK\x03\x04" + bytes(40),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_a_file_that_is_no_python_is_one_line(kind: str, tmp_path: Path):
    """In one process, as `load_config` says it."""
    file = tmp_path / "config.py"
    file.write_bytes(BYTES[kind])
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        load_config(file)
    assert "\n" not in str(error.value)


def test_a_variant_of_a_file_without_any_is_one_line(tmp_path: Path):
    file = write(tmp_path, "return OPD()")
    assert error_of(f"--config={file}:small").startswith(
        f"{file}, line 4: TypeError: get_config() takes 0 positional arguments but 1 was given"
    )


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "no such file; configs/ of a clone holds those of the project"),
        (Path.mkdir, "is a folder, expected a Python file"),
        (os.mkfifo, "is no regular file, expected a Python file"),
        (lambda path: path.symlink_to("nowhere"), "is no regular file, expected a Python file"),
    ],
    ids=["missing", "a folder", "a pipe", "a link to nothing"],
)
def test_a_file_that_is_not_there_is_one_line(make: Callable[[Path], None], problem: str, tmp_path: Path):
    path = tmp_path / "config.py"
    make(path)
    for flags in ([], ["--config.seed=1"]):
        assert error_of(f"--config={path}", *flags) == f"config: {path}: {problem}"


def test_an_unknown_variant_is_one_line_with_its_place():
    error = error_of(f"--config={ROOT}/configs/miniature_teacher.py:beauty")
    assert error.startswith(f"{ROOT}/configs/miniature_teacher.py, line ")
    assert error.endswith("variant: found 'beauty', expected text or composition or quality or smoke, or CHOICE:smoke")


def test_a_name_that_no_file_has_is_one_line():
    assert error_of("--config=") == "config: found '', expected FILE.py[:variant]"
    assert error_of(f"--config={'x' * 300}.py").endswith("xxx.py: File name too long")


def test_no_config_is_one_line():
    assert error_of() == "--config: missing, expected --config=FILE.py, or --workdir=DIR of a run"


def test_several_values_may_follow_some_flags():
    given = ["program", "--config=x", "--models", "base", "a=b", "--suites", "c,d", "--models=e=f", "g=h", "--models"]
    assert spread_values(given, ("models",)) == [
        "program", "--config=x", "--models=base", "--models=a=b", "--suites", "c,d", "--models=e=f", "--models=g=h",
    ]  # fmt: skip
