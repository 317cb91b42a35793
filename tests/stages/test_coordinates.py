"""Coordinates of a run: what they do not go with, what its plan is made of, and what it leaves."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.adapters.coordinates import skills_of, with_coordinates
from fopd_jax.adapters.lora import Adapter
from fopd_jax.config.parse import assign, resolve
from fopd_jax.interop.files.safetensors import load_adapter, save_adapter
from fopd_jax.interop.lora.cards import read_card
from fopd_jax.models.coordinates import LAYER
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.stages.abstract import abstract_update
from fopd_jax.stages.coordinates import check_coordinates, drawn_coordinates, skills, turned
from fopd_jax.stages.opd import plan_opd
from fopd_jax.stages.pipeline import make_pipeline, weight_path
from fopd_jax.stages.registry import find_stage
from fopd_jax.stages.stored import export_stored
from fopd_jax.steps.state import init_state, make_optimizer
from tests.configs import FOLDER, load
from tests.quick import environment

TEACHER, WIDTH, SKILLS, RANK = "packaged:teacher_text.safetensors", 128, ("composition", "text"), 8


def dialled(**changes: Any) -> Any:
    config = load("miniature", "smoke", **{"coordinates.rank": RANK})
    assign(config, changes)
    return resolve(config)


def teacher() -> Adapter:
    return load_adapter(weight_path(TEACHER))[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"trained": "params"}, "coordinates.rank: found 8, expected 0: they belong to an adapter"),
        ({"whole_teachers": True}, "coordinates.rank: found 8, expected 0: whole_teachers hold no base"),
        ({"objective.name": "mixed"}, "coordinates.rank: found 8, expected 0: the rewards of objective 'mixed'"),
        ({"tasks.text.extrapolation": 0.5}, "tasks.text.extrapolation: found 0.5, expected 0.0: coordinates say who"),
        ({"tasks.text.mix": {"text": 1.0}}, "tasks.text.mix: found {'text': 1.0}, expected {}: coordinates say who"),
        ({"coordinates.joint": 0.75}, "coordinates.alone, joint and base: found 1.25 in all, expected shares"),
        ({"eval.coordinates": {"x": 1.0}}, "eval.coordinates: found x, expected some of composition, text"),
        ({"coordinates.rank": 0, "eval.coordinates": {"text": 1.0}}, "eval.coordinates: found {'text': 1.0}, expected"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        check_coordinates(dialled(**changes))


def test_another_stage_has_none_to_choose():
    with pytest.raises(ValueError, match=r"^eval\.coordinates: found {'text': 1.0}, expected {}: what trains has none"):
        check_coordinates(resolve(load("miniature_rl", "text", **{"eval.coordinates": {"text": 1.0}})))


def test_a_plan_draws_them_trains_them_and_asks_the_base():
    config = dialled()
    plan, plain = plan_opd(config), plan_opd(dialled(**{"coordinates.rank": 0}))
    batch, count = plan.stream.batch(5), config.batch_size
    assert batch.mix is not None
    assert jax.tree.map(np.shape, (batch.coordinates, batch.mix)) == (
        (count, 2), dataclasses.replace(batch.mix, bank=(count, 3), weights=(count, 2, 3))
    )  # fmt: skip
    np.testing.assert_array_equal(batch.mix.bank[0], [0, 1, 3])  # behind the anchor
    jax.tree.map(np.testing.assert_array_equal, plan.stream.batch(5), batch)
    np.testing.assert_array_equal(plain.stream.batch(5).route, batch.route)
    assert (plain.stream.batch(5).mix, plain.stream.batch(5).coordinates, drawn_coordinates(dialled())) == (
        None, None, drawn_coordinates(config)
    )  # fmt: skip
    assert jax.tree.map(lambda leaf: leaf.shape, plan.trained.state.trained.weights[LAYER]) == {
        "a": (2, RANK), "b": (RANK, WIDTH)
    }  # fmt: skip
    banks = [jax.tree.leaves(each.held()["bank"])[0].shape for each in (plain, plan)]
    assert (banks[0][-3], banks[1][-3]) == (3, 4)
    assert plan.cost().teachers == pytest.approx(2 * plain.cost().teachers)  # 2 skills, base and anchor; not 2 rows
    assert plan.cost().backward > plain.cost().backward
    assert plan.cost().forward == plain.cost().forward


def test_an_update_for_other_machines_has_them():
    config = dialled()
    update = abstract_update(config, make_mesh(config.run.mesh, jax.devices()[:1]))
    with jax.numpy_dtype_promotion("standard"):  # optax counts in Python's numbers
        state, metrics = jax.eval_shape(update.step, *update.arguments)
    assert skills_of(state.trained) == 2
    assert {"teacher_gap/text", "teacher_gap/composition"} < set(metrics)


def test_a_teacher_with_coordinates_is_refused(tmp_path: Path):
    file = tmp_path / "teacher.safetensors"
    own = with_coordinates(jax.random.key(0), teacher(), 2, RANK, WIDTH)
    save_adapter(file, own, {"preset": "miniature"})
    problem = rf"^tasks\.text\.teacher: {re.escape(str(file))}: has capability coordinates, expected an adapter without"
    with pytest.raises(ValueError, match=problem):
        plan_opd(dialled(**{"tasks.text.teacher": str(file), "tasks.text.guidance": 1.0}))


def test_what_is_left_keeps_them_and_says_their_names(tmp_path: Path):
    """From a checkpoint, at another rank than the config's, as merges may have."""
    config = dialled(**{"cold_start.merge": "concatenate", "coordinates.high": 1.5})
    own = with_coordinates(jax.random.key(0), teacher(), 2, RANK, WIDTH)
    own = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 0.5, own)
    state = init_state(own, make_optimizer(config.optimizer), 0)
    checkpoints = Checkpoints(tmp_path / "run", 1, config_hash="c0ffee")
    checkpoints.save(3, dataclasses.replace(state, step=jnp.int32(3)))
    checkpoints.close()
    (tmp_path / "out").mkdir()
    pipeline, origin = make_pipeline(config.model, config.run, dict), find_stage(config).origin
    export_stored(config, pipeline, tmp_path / "run", 3, tmp_path / "out", origin)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    found, card = load_adapter(path)[0], read_card(path)
    jax.tree.map(np.testing.assert_array_equal, found.weights, own.weights)
    assert card is not None
    assert (card.coordinates, card.coordinates_high, card.rank) == (SKILLS, 1.5, teacher_rank())
    assert skills(config) == SKILLS


def teacher_rank() -> int:
    return teacher().weights["last_block"]["attn"]["to_q"]["a"].shape[-1]


def test_evaluations_are_made_where_the_config_says():
    own = {LAYER: {"a": np.ones((2, RANK)), "b": np.ones((RANK, WIDTH))}}
    at = turned(SKILLS, dialled(**{"eval.coordinates": {"text": 1.5}}).eval, own)[LAYER]["at"]
    np.testing.assert_array_equal(at, [1.0, 1.5])
    assert turned((), dialled().eval, {}) == {}


# ---- whole runs

CHANGES = {"coordinates.rank": RANK, "run.eval_every": 0, "eval.final_samples": 2, "batch_size": 4}


def run(folder: Path, steps: int, devices: int = 1, **changes: Any) -> None:
    fields = {**CHANGES, "run.steps": steps, "run.checkpoint_every": 1, **changes}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "fopd_jax.main", f"--config={FOLDER}/miniature.py:smoke", f"--workdir={folder}"]
    done = subprocess.run([*command, *options], env=environment(devices), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def logged(folder: Path) -> dict[str, float]:
    """What both updates say of loss, gaps and gradient, by metric and step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = ("train/loss", "train/grad_norm", "train/teacher_gap", "train/teacher_gap/text")
    return {f"{name} {line['step']}": line[name] for line in lines for name in wanted if name in line}


@pytest.mark.slow
def test_a_run_that_was_stopped_leaves_the_same_bits_and_a_mesh_the_same_numbers(tmp_path: Path):
    """Between meshes loss, gaps and norm of the gradient agree to 1e-4: of Adam's first updates rounding is a part."""
    run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    run(tmp_path / "parts", 2)
    files = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert np.any(load_adapter(tmp_path / "whole" / "student.safetensors")[0].weights[LAYER]["b"])
    run(tmp_path / "mesh", 2, 4, **{"run.mesh.data": 2, "run.mesh.fsdp": 2})
    found, expected = (logged(tmp_path / name) for name in ("mesh", "whole"))
    assert len(expected) == 8
    assert found == pytest.approx(expected, rel=1e-4)
