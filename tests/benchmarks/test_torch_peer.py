"""The PyTorch peer computes our update, in every form, and counts its forwards rightly.

Tolerance: the peer's own, 1e-4 relative on loss, gradient norm and gradient, both sides in float32.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.configs import load

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FORWARDS = {"ours": 72.0, "replay": 92.0, "fused": 72.0}  # SD3.5's 9 trained steps of 10, all guided
LOCAL = ("peer_problem", "peer_report", "our_step", "our_check", "torch_policies", "torch_opd", "torch_peer")


@pytest.fixture(scope="module")
def programs() -> Any:
    """The benchmarks' modules by name; they import each other as programs of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in LOCAL}
        for name in LOCAL:
            sys.modules.pop(name)


def sd35_config() -> Any:
    return load("sd35m_opd")


def tiny_config() -> Any:
    """SD3.5's own objective, sampler and routing, on three steps, with teachers of different guidance."""
    config = sd35_config()
    config.sampler.num_steps, config.adapter.rank = 3, 2
    config.tasks["ocr"].guidance, config.objective.mar_beta = 1.0, 0.5
    return config


@pytest.fixture(scope="module")
def folder(programs: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our side's files for a tiny network."""
    from fopd_jax.models.mmdit import MMDiTConfig

    network = MMDiTConfig(
        depth=3, num_heads=2, head_dim=8, dual_layers=1, qk_norm=True, patch_size=2, channels=3,
        context_dim=6, pooled_dim=5, table_size=4, base_size=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("check")
    programs["our_check"].write_check(programs["our_step"].comparable(tiny_config(), 2), network, path)
    return path


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("form", ["replay", "fused"])
def test_loss_and_gradient_are_ours(programs: dict[str, ModuleType], folder: Path, form: str, copies: bool):
    peer = programs["torch_peer"]
    found = peer.check(folder, form, copies)
    print(form, copies, found)
    assert max(found.values()) <= peer.TOLERANCE


def test_samples_can_be_differentiated_a_few_at_a_time(programs: dict[str, ModuleType], folder: Path):
    peer = programs["torch_peer"]
    assert max(peer.check(folder, "fused", False, microbatch=3).values()) <= peer.TOLERANCE


@pytest.mark.parametrize(
    "change", [{"guidance": 4.6}, {"mar_beta": 0.6}, {"weighting": "ode"}, {"teacher_guidance": (4.5, 2.0, 4.5)}]
)
def test_the_check_sees_another_problem(
    programs: dict[str, ModuleType], folder: Path, tmp_path: Path, change: dict[str, Any]
):
    peer, problem = programs["torch_peer"], programs["peer_problem"].Problem.read(folder / "problem.json")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dataclasses.replace(problem, **change).write(tmp_path / "problem.json")
    assert max(peer.check(tmp_path, "fused", False).values()) > 10 * peer.TOLERANCE


@pytest.mark.parametrize("form", ["replay", "fused"])
def test_forwards_counted_are_those_of_the_formula(programs: dict[str, ModuleType], folder: Path, form: str):
    problem = programs["peer_problem"].Problem.read(folder / "problem.json")
    policies = programs["torch_policies"].Policies(problem, torch.device("cpu"), False, None)
    update = programs["torch_opd"].TorchOPD(problem, policies, form, problem.batch)
    batch = programs["torch_peer"].random_batch(problem, torch.device("cpu"))
    update.update(batch)
    counts = policies.counts
    expected = programs["peer_problem"].forward_equivalents(problem, form)
    assert (counts.forward + counts.backward) / problem.batch == expected
    assert counts.recomputed == 0
    policies.models["student"].enable_gradient_checkpointing()
    update.update(batch)
    assert counts.recomputed == counts.backward / 2


def test_forwards_of_sd35(programs: dict[str, ModuleType]):
    from fopd_jax.models.mmdit import PRESETS

    ours = programs["our_step"]
    problem = ours.make_problem(ours.comparable(sd35_config(), 4), PRESETS["sd35_medium"], (64, 64, 16), 205)
    found = {form: programs["peer_problem"].forward_equivalents(problem, form) for form in FORWARDS}
    assert found == FORWARDS
    assert problem.teachers == 4
    assert programs["torch_peer"].forward_flops(problem) == pytest.approx(2.22e12, rel=0.01)


def test_a_config_that_the_peer_lacks_is_named(programs: dict[str, ModuleType]):
    config = sd35_config()
    config.updates_per_rollout = 2
    with pytest.raises(ValueError, match="updates_per_rollout: found 2, but the comparison has only 1"):
        programs["our_step"].comparable(config, 0)


def test_ratio_is_arithmetic_times_efficiency(programs: dict[str, ModuleType]):
    ours = [{"samples_per_s": rate, "forward_equivalents": 72.0} for rate in (3.0, 4.0, 5.0)]
    theirs = [{"samples_per_s": 2.0, "forward_equivalents": 92.0}] * 3
    found = programs["peer_report"].pair(ours, theirs)
    assert found["ratio"] == 2.0
    assert found["ratio_by_round"] == [1.5, 2.0, 2.5]
    assert found["arithmetic"] == pytest.approx(92 / 72)
    assert found["arithmetic"] * found["efficiency"] == pytest.approx(found["ratio"])
