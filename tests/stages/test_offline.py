"""What regularises, through the stage: what is refused, what a plan counts, what the feed gives, and resuming."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fopd_jax.config.identity import config_hash
from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import OPD, MeshShape, Pairs
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.running.checkpoints import Checkpoints
from fopd_jax.stages.abstract import abstract_update
from fopd_jax.stages.check import describe_plan
from fopd_jax.stages.files import input_files
from fopd_jax.stages.opd import OPDPlan, make_opd, plan_opd
from fopd_jax.steps.state import TrainState
from fopd_jax.worlds.prompt_stream import Batch
from tests.configs import load

OFFLINE: dict[str, Any] = {
    "offline.weight": 0.5,
    "offline.batch_size": 6,
    "offline.tasks": {"text": Pairs(share=2.0), "composition": Pairs()},
}
MOVING: dict[str, Any] = {"anchor.moves": "slow", "anchor.decay": 0.9, "anchor.bound": 1e-3, "anchor.bound_rate": 0.5}


def config_of(changes: dict[str, Any]) -> OPD:
    config = load("miniature", "smoke")
    config.run.encoding.cache = ""
    assign(config, changes)
    return resolve(config)


def plan(changes: dict[str, Any]) -> OPDPlan:
    return plan_opd(config_of(changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"offline.tasks": {}}, r"offline\.tasks: found none, expected some where offline\.weight is 0\.5"),
        (
            {"offline.tasks": {"ocr": Pairs()}},
            r"offline\.tasks: found 'ocr', expected some of \('text', 'composition'\)",
        ),
        ({"offline.tasks": {"text": Pairs(test="x")}}, r"offline\.tasks\.text\.test: found some, expected none"),
        ({"offline.tasks": {"text": Pairs(images="x")}}, r"offline\.tasks\.text\.images: found 'x', expected ''"),
        (
            {"offline.tasks": {"text": Pairs(share=0.0)}},
            r"offline\.tasks: found shares \[0\.0\], expected at least one",
        ),
    ],
    ids=["none", "unknown", "test", "folder", "shares"],
)
def test_images_that_are_not_there_are_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=f"^{problem}"):
        plan(OFFLINE | changes)


def test_a_plan_counts_and_names_what_regularises(tmp_path: Path):
    plain, beside, moving = (plan(changes) for changes in ({}, OFFLINE, MOVING))
    assert set(beside.metrics) - set(plain.metrics) == {"offline_loss"}
    assert set(moving.metrics) - set(plain.metrics) == {"mar_beta"}
    more = dataclasses.astuple(beside.cost() + plain.cost() * -1)
    each = dataclasses.astuple(plain.cost())
    trained = 8 * 2  # samples times timesteps, of which the student's guidance is 1
    np.testing.assert_allclose(more[:2], 0)
    np.testing.assert_allclose(np.array(more[2:4]) * trained, np.array(each[2:4]) * 6)
    assert moving.cost().teachers == pytest.approx(plain.cost().teachers, rel=0.01)  # one forward for another
    state = moving.trained.state
    assert state.old is not None
    assert (state.beta.shape, state.beta.dtype) == ((), np.float32)
    assert "old copy" in moving.held()
    assert plain.trained.state.old is plain.trained.state.beta is None
    config = config_of(OFFLINE | MOVING)
    told = [line.split(maxsplit=1) for line in describe_plan(beside, config, tmp_path / "run").splitlines()]
    assert ["beside", "flow matching of 6 images of composition, text (weight 0.5)"] in told
    assert any(
        "the student's own average (slow)" in line for line in describe_plan(moving, config, tmp_path).splitlines()
    )


def test_an_anchor_without_weight_keeps_no_copy():
    state = plan(MOVING | {"objective.mar_beta": 0.0}).trained.state
    assert state.old is state.beta is None


def test_the_abstract_update_has_the_batch_that_a_run_has():
    update = abstract_update(config_of(OFFLINE | MOVING), make_mesh(MeshShape(), jax.devices()[:1]))
    _, state, batch = update.arguments
    assert batch.offline["x0"].shape == (6, 24, 24, 3)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch.offline)} == {6}
    assert state.beta.shape == ()


def test_folders_of_images_are_input_files(tmp_path: Path):
    config = load("sd35m_opd")
    config.offline.tasks = {"photos": Pairs(images=str(tmp_path))}
    assert input_files(config)["offline.tasks.photos.images"] == tmp_path


# ---- the stage


@contextlib.contextmanager
def stage_of(folder: Path, changes: dict[str, Any]) -> Any:
    with contextlib.closing(make_opd(config_of(changes), folder)) as stage:
        yield stage


def steps(stage: Any, state: TrainState, first: int, stop: int) -> tuple[TrainState, list[dict[str, float]]]:
    seen = []
    for step in range(first, stop):
        with jax.numpy_dtype_promotion("standard"):  # optax raises its betas to an integer count
            state, metrics = stage.advance(state, step)
        seen.append({name: float(value) for name, value in metrics.items() if not name.startswith("samples/")})
    return state, seen


def same(found: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("moves", ["slow", "ema"])
def test_a_run_that_goes_on_is_one_that_never_stopped(moves: str, tmp_path: Path):
    """Bit by bit: weights, averages, β, and the captioned rows of the later steps."""
    changes = OFFLINE | MOVING | {"anchor.moves": moves, "run.steps": 4, "run.eval_every": 0}
    with stage_of(tmp_path / "whole", changes) as stage:
        state, seen = steps(stage, stage.start(), 0, 2)
        kept = Checkpoints(tmp_path / "whole", 2, config_hash=config_hash(stage.config))
        kept.save(2, state)
        kept.close()
        fed = stage.batch(3)
        assert isinstance(fed[0], Batch)
        assert fed[1]["x0"].shape == (6, 24, 24, 3)
        whole, later = steps(stage, state, 2, 4)
    with stage_of(tmp_path / "again", changes) as stage:
        kept = Checkpoints(tmp_path / "whole", 2, config_hash=config_hash(stage.config))
        restored = kept.restore(stage.state)
        kept.close()
        jax.tree.map(np.testing.assert_array_equal, stage.batch(3), fed)
        again, expected = steps(stage, restored, 2, 4)
    same(again, whole)
    assert later == expected
    assert seen[0]["anchor_gap"] == 0
    assert later[1]["anchor_gap"] > 0
    betas = [each["mar_beta"] for each in (*seen, *later)]
    assert betas[0] == pytest.approx(0.02)
    assert betas[1] == pytest.approx(0.02 * np.exp(-0.5))
    assert len(set(betas)) == 4
    assert all(np.isfinite(each["offline_loss"]) for each in later)
