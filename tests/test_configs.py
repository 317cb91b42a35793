"""Every config is a manual that runs: its docstring holds its command, it names what deviates, wrong ones are named."""

import dataclasses
import json
import operator
import os
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from fopd_jax.config import learning, schema
from fopd_jax.config.identity import config_hash, identity
from fopd_jax.config.learning import GRPO, Reinforced
from fopd_jax.config.parse import current_name, flatten, open_entry, override, resolve, thaw
from fopd_jax.config.schema import OPD, FlowMatching, RoutedTask, Section
from fopd_jax.parallel.mesh import AXES
from fopd_jax.stages import forward_rl_update, grpo_update
from fopd_jax.stages.plan import few_images
from tests.configs import EVERY, FOLDER, VARIANTS, load, smoke_variant
from tests.launch.test_documented import value


def _docstring(name: str) -> str:
    return runpy.run_path(str(FOLDER / f"{name}.py"))["__doc__"] or ""


def test_every_config_file_is_covered():
    files = FOLDER.rglob("*.py")
    assert {path.relative_to(FOLDER).with_suffix("").as_posix() for path in files} == VARIANTS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_docstring_holds_command_cost_and_result(name: str):
    text = _docstring(name)
    assert f"python -m fopd_jax.main --config=configs/{name}.py" in text
    assert "Cost on 2 CPU cores:" in text
    assert "Result" in text
    assert "@@" not in text  # an unfilled figure


@pytest.mark.parametrize("name", VARIANTS)
def test_the_settings_that_a_docstring_names_exist_under_names_of_today(name: str):
    config = load(name, VARIANTS[name][0])
    for field in re.findall(r"--config\.([\w.]+)=", _docstring(name)):
        open_entry(config, field, "1")
        operator.attrgetter(field)(_Attributes(config))  # AttributeError where it does not
        assert current_name(field) == field


class _Attributes:
    """Entries of dicts as attributes, too."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __getattr__(self, name: str) -> Any:
        return _Attributes(self.node[name] if isinstance(self.node, dict) else getattr(self.node, name))


# ---- reinforcement learning


TEACHERS = [each for each in EVERY if each[0] in ("sd35m_grpo", "sd35m_fast", "sd35m_nft")]


def _recipes(name: str) -> list[dict[str, str]]:
    """The settings of each entry in a docstring's list of other recipes."""
    listed = _docstring(name).partition("Other recipes are settings:\n")[2]
    entries = re.split(r"\n {4}(?=--)", "\n" + listed)[1:]
    return [dict(re.findall(r'--config\.([\w.]+)="?([^\s"]+)"?', entry)) for entry in entries]


def _spec(config: Any) -> Any:
    """A resolved config's update, as far as shapes go, on a machine whose batch ways divide it."""
    config, mesh = resolve(config), AbstractMesh((2, 1, 1), AXES)
    update = grpo_update if isinstance(config, GRPO) else forward_rl_update
    return update.abstract_update(config, mesh).pieces.spec


@pytest.mark.parametrize(("name", "variant"), TEACHERS)
def test_a_teachers_config_makes_an_update(name: str, variant: str):
    config = load(name, variant)
    spec = _spec(config)
    assert set(spec.rewards) == {each for task in config.tasks.values() for each in task.rewards}
    assert (spec.group, config.batch_size) in ((24, 1152), (18, 1152))
    assert spec.guidance == config.eval.guidance == (4.5 if name == "sd35m_grpo" else 1.0)
    assert config.ema.every * spec.updates_per_rollout == 8
    assert spec.trained == (3 if name == "sd35m_fast" else 9) if isinstance(config, GRPO) else True
    assert {each for task in config.tasks.values() for each in task.rewards} >= config.rewards.keys()
    assert [*few_images(config)] == []


@pytest.mark.parametrize("name", dict(TEACHERS))
def test_other_recipes_make_updates_too(name: str):
    recipes = _recipes(name)
    assert len(recipes) >= 3
    for recipe in recipes:
        assert recipe
        config = resolve(load(name))
        for field, text in recipe.items():
            open_entry(thawed := thaw(config), field, text)
            config = resolve(override(thawed, {field: value(text)}))
        _spec(config)


@pytest.mark.parametrize(("changes", "few"), [
    ({"batch_size": 64, "images_per_prompt": 8}, "found 8 prompts of 8 images"),
    ({"batch_size": 256, "images_per_prompt": 32}, "found 8 prompts of 32 images"),
    ({"batch_size": 256, "images_per_prompt": 16}, ""),
])  # fmt: skip
def test_batches_that_are_known_to_collapse_are_told(changes: dict[str, int], few: str):
    told = [*few_images(load("sd35m_grpo", "ocr", **changes))]
    assert [line for line in told if few and few in line] == told
    assert bool(told) == bool(few)
    assert [*few_images(load("sd35m_grpo", "ocr:smoke"))] == []  # of small networks this is not known


# ---- variants


def test_variants_resolve_under_names_of_their_own():
    configs = [resolve(load(name, each)) for name, variant in EVERY for each in (variant, smoke_variant(variant))]
    assert len({config.name for config in configs}) == len(configs)


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_a_smoke_variant_keeps_stage_and_recipe_and_needs_no_file(name: str, variant: str):
    whole, small = (resolve(load(name, each)) for each in (variant, smoke_variant(variant)))
    assert type(small) is type(whole)
    for field in ("seed", "trained", "adapter", "optimizer", "ema"):
        assert getattr(small, field) == getattr(whole, field)
    assert small.model.preset == "miniature"
    paths = [small.model.path]
    if isinstance(small, Reinforced) and isinstance(whole, Reinforced):
        for field in ("objective", "advantages", "guidance", "minibatches", "updates_per_rollout"):
            assert getattr(small, field) == getattr(whole, field)
        assert small.rollouts == dataclasses.replace(whole.rollouts, num_steps=3)
    if isinstance(small, OPD) and isinstance(whole, OPD):
        assert small.objective == whole.objective
        fitted = {"window": whole.sampler.window and (0, 1), "trained": whole.sampler.trained and (1, 2)}
        assert small.sampler == dataclasses.replace(whole.sampler, num_steps=3, **fitted)
        paths += [small.anchor.adapter, *(task.teacher for task in small.tasks.values() if not task.network)]
    assert all(path.startswith("packaged:") for path in paths)
    assert small.run.steps <= 2


def test_the_first_variant_is_the_default():
    for name, (first, *_) in VARIANTS.items():
        assert load(name) == load(name, first)
        assert load(name, "smoke") == load(name, smoke_variant(first))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("miniature", "text"),
        ("miniature_pretrain", "dirty"),
        ("miniature_teacher", "music"),
        ("miniature_teacher", "text:tiny"),
        ("miniature_teacher", "music:smoke"),
        ("sd35m_opd", "smoke:smoke"),
        ("sd35m_grpo", "multi"),
        ("sd35m_fast", "mix"),
        ("sd35m_nft", "deqa:smoke"),
    ],
)
def test_unknown_variants_are_named(name: str, variant: str):
    with pytest.raises(ValueError, match=f"^variant: found '{variant}', expected .*smoke"):
        load(name, variant)


# ---- what a config names


def _sections() -> list[type[Section]]:
    known = {**vars(schema), **vars(learning)}.values()
    found = [each for each in known if isinstance(each, type) and issubclass(each, Section)]
    return [each for each in found if dataclasses.is_dataclass(each)]


Named = dict[tuple[int, str, str], list[bool]]


def _named(name: str, monkeypatch: pytest.MonkeyPatch) -> Named:
    """`{(line, section, field): whether it is given its default, each time}` over all variants of a config."""
    found: Named = defaultdict(list)
    file = str(FOLDER / f"{name}.py")

    def watch(kind: Any) -> None:
        plain, fields, defaults = kind.__init__, [field.name for field in dataclasses.fields(kind)], kind()

        def init(self: Any, *positional: Any, **named: Any) -> None:
            frame = sys._getframe(1)
            if frame.f_code.co_filename == file:
                for field, value in (dict(zip(fields, positional, strict=False)) | named).items():
                    found[frame.f_lineno, kind.__name__, field].append(value == getattr(defaults, field))
            plain(self, *positional, **named)

        monkeypatch.setattr(kind, "__init__", init)

    for kind in _sections():
        watch(kind)
    for variant in VARIANTS[name]:
        load(name, variant)
    return found


@pytest.mark.parametrize("name", [each for each in VARIANTS if "recipes/" not in each])  # these name what is published
def test_a_config_names_only_what_deviates(name: str, monkeypatch: pytest.MonkeyPatch):
    named = _named(name, monkeypatch)
    assert len(named) >= (5 if name == "miniature_teachers" else 10)  # it changes another config
    assert [where for where, defaults in named.items() if all(defaults)] == []


# ---- the whole of it, to read


def _printed(*flags: str) -> dict[str, tuple[Any, str, str]]:
    """`{field: (value, origin, meaning)}` as the program prints them."""
    done = subprocess.run(
        [sys.executable, "-m", "fopd_jax.main", f"--config={FOLDER}/miniature.py", "--print-config", *flags],
        capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [re.fullmatch(r"(\S+) += (.+?) +(default|file|flag) +(.*)", line) for line in done.stdout.splitlines()]
    assert all(lines), done.stdout
    return {line[1]: (json.loads(line[2]), line[3], line[4]) for line in lines if line}


FROM_FILE = {
    "name", "model.preset", "model.path", "model.dtype", "batch_size", "optimizer.learning_rate", "optimizer.warmup",
    "ema.decay", "ema.every", "eval.samples", "eval.batch_size", "eval.num_steps", "eval.guidance",
    "eval.final_samples", "run.eval_every", "run.attention", "tasks.text.teacher", "tasks.text.guidance",
    "tasks.composition.teacher", "tasks.composition.guidance", "anchor.name", "anchor.adapter", "anchor.guidance",
    "guidance", "cold_start.weights.text", "cold_start.weights.composition", "cold_start.weights.quality",
    "sampler.num_steps", "objective.weighting",
}  # fmt: skip


def test_print_config_tells_every_field_and_where_it_comes_from():
    changes = {"seed": 5, "run.steps": 7, "run.remat": "dots", "tasks.text.weight": 3.0, "sampler.window": (1, 3)}
    printed = _printed(
        "--config.seed=5", "--config.run.steps=7", "--config.model.remat=dots", "--config.tasks.text.weight=3.0",
        "--config.sampler.window=(1,3)",
    )  # fmt: skip
    config = resolve(override(load(), changes))
    assert {name: value for name, (value, _, _) in printed.items()} == flatten(config)
    for name, (_, origin, meaning) in printed.items():
        assert origin == ("flag" if name in changes else "file" if name in FROM_FILE else "default"), name
        assert meaning, name
    assert "[paper]" in printed["objective.mar_beta"][2]


# ---- identity


@pytest.mark.parametrize("name", VARIANTS)
def test_identity_ignores_what_changes_no_step(name: str):
    config = resolve(load(name))
    changes = {
        "steps": 1000, "log_every": 7, "keep_checkpoints": 9, "mesh.fsdp": 4, "conditioning_cache": "elsewhere",
        "encode_batch_size": 8, "model.remat": "full", "watchdog_seconds": 1.0,
    }  # fmt: skip
    assert config_hash(resolve(override(config, changes))) == config_hash(config)
    changed = resolve(override(config, {"optimizer.clip_norm": 0.5}))
    assert config_hash(changed) != config_hash(config)
    assert {k for k, v in identity(changed).items() if identity(config).get(k) != v} == {"optimizer.clip_norm"}


def test_identity_leaves_out_what_defaults_say():
    """So a field that a later version adds changes no hash."""
    tasks = {"b": RoutedTask("b"), "a": RoutedTask("a")}
    bare = resolve(OPD(name="any", tasks=tasks))
    assert identity(bare) == {
        "stage": "opd", "name": "any", "tasks": ["a", "b"], "tasks.a.teacher": "a", "tasks.b.teacher": "b",
    }  # fmt: skip
    spelt = override(bare, {"eval.tasks": ("a", "b"), "cold_start.weights": {"a": 0.5, "b": 0.5}, "tasks.a.weight": 1})
    assert identity(resolve(spelt)) == identity(bare)
    assert identity(resolve(FlowMatching(name="any"))) == {"stage": "flow_matching", "name": "any", "tasks": []}
