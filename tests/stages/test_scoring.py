"""From latents to credit: on the host and within a program, against a loop over samples; 1e-6."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fopd_jax.conditioning.encoder import Conditioning
from fopd_jax.config.learning import Comparison, Decoding
from fopd_jax.config.schema import MeshShape
from fopd_jax.parallel.mesh import make_mesh
from fopd_jax.rewards import pool
from fopd_jax.rewards.pool import TooManyFailures
from fopd_jax.rewards.reward import Reward, Scores, Traced, collect
from fopd_jax.running.journal import Journal
from fopd_jax.stages.scoring import Scoring
from fopd_jax.stages.traced_scoring import is_traceable, make_traced_scoring
from fopd_jax.steps.grpo.spec import Credit
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.decoder import pixels_as_latents
from fopd_jax.worlds.prompt_stream import Drawn
from fopd_jax.worlds.world import World

CHANNELS = {"red": 0, "green": 1, "blue": 2}
NAMES = {"ocr": {"red": 1.0}, "counting": {"blue": 2.0, "red": 0.5, "green": 0.0}}  # green: logged only
LIMIT = 200
"""Of an image's first byte of a channel; above it that reward fails."""
TASKS = ["ocr"] * 3 + ["counting"] * 3 + ["ocr"] * 3 + ["ocr"] * 3 + ["counting"] * 3
PROMPTS = ["a", "b", "a", "c", "d"]  # the third draws the first's prompt again
GROUPS = np.repeat(np.arange(5), 3)


def make_reward(name: str) -> Reward:
    channel = CHANNELS[name]

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Any) -> Scores:
        broken = images[:, 0, 0, channel] > LIMIT
        values = images[..., channel].mean((1, 2)) / 255
        return collect([ValueError("broken") if bad else (float(v), {}) for v, bad in zip(values, broken, strict=True)])

    def within(params: Any, images: jax.Array, rows: Any) -> jax.Array:
        values = images[..., channel].astype(jnp.float32).mean((1, 2)) / 255
        return jnp.where(images[:, 0, 0, channel] > LIMIT, jnp.nan, values)

    traced = Traced(lambda prompts, metadata: {"length": np.int32([len(each) for each in prompts])}, within)
    return Reward(name, score, (0.0, 1.0), "host", traced=traced)


def make_world() -> World:
    tasks = {name: Task(name, ("a",), ("a",), rewards=rewards) for name, rewards in NAMES.items()}

    def encode(prompts: Sequence[str]) -> Conditioning:
        raise AssertionError

    rewards = {name: make_reward(name) for name in CHANNELS}
    return World((4, 4, 3), tasks, encode, lambda latents: latents, rewards=rewards, decoder=pixels_as_latents())


def drawn(merged: bool) -> list[Drawn]:
    groups = np.where(GROUPS == 2, 0, GROUPS) if merged else GROUPS
    return [Drawn(task, PROMPTS[GROUPS[i]], {}, 0, int(groups[i])) for i, task in enumerate(TASKS)]


def latents() -> np.ndarray:
    """Group 3 is all equal, of group 4 one image alone can be scored; one of group 0 and one of group 1 fails."""
    found = np.clip(0.4 * np.random.default_rng(0).standard_normal((15, 4, 4, 3), np.float32), -1, 1)
    found[:, 0, 0] = 0
    found[9:12] = found[9]
    found[1, 0, 0, 0] = found[4, 0, 0, 2] = found[12, 0, 0, 0] = found[13, 0, 0, 2] = 0.9
    found[5, 0, 0, 1] = 0.9  # of the one that is logged only: the sample takes part
    return found


def expected(comparison: Comparison, rows: Sequence[Drawn]) -> dict[str, np.ndarray]:
    """Sample by sample, in float64."""
    pixels = np.clip(np.round(latents() * 127.5 + 127.5), 0, 255)
    names = ("red", "blue", "green")
    values = np.full((3, 15), np.nan)
    totals: dict[int, float] = {}
    for i, row in enumerate(rows):
        for k, name in enumerate(names):
            if name in NAMES[row.task] and pixels[i, 0, 0, CHANNELS[name]] <= LIMIT:
                values[k, i] = pixels[i, :, :, CHANNELS[name]].mean() / 255
        total = sum(w * values[names.index(name), i] for name, w in NAMES[row.task].items() if w)
        if np.isfinite(total):
            totals[i] = total
    members: dict[int, list[int]] = {}
    for i in totals:
        members.setdefault(rows[i].group, []).append(i)
    members = {group: each for group, each in members.items() if len(each) > 1}
    valid = sorted(i for each in members.values() for i in each)
    spreads = {task: np.std([totals[i] for i in valid if rows[i].task == task]) for task in NAMES}
    advantage, flat = np.zeros(15), np.zeros(15, bool)
    for each in members.values():
        of_group = [totals[i] for i in each]
        for i in each:
            flat[i] = max(of_group) == min(of_group)
            by = np.std(of_group) if comparison.normalise == "group" else spreads[rows[i].task]
            advantage[i] = 0 if flat[i] else (totals[i] - np.mean(of_group)) / (by + 1e-4)
    advantage = np.clip(advantage, -comparison.clip, comparison.clip)
    return {"advantage": advantage, "values": values, "valid": np.isin(np.arange(15), valid), "flat": flat}


def check(credit: Credit, comparison: Comparison, rows: Sequence[Drawn]) -> None:
    oracle = expected(comparison, rows)
    for name, value in oracle.items():
        np.testing.assert_allclose(getattr(credit, name), value, rtol=1e-6, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(credit.counts, oracle["valid"] & ~oracle["flat"])
    assert 0 < oracle["flat"].sum() < oracle["valid"].sum() < 15
    np.testing.assert_array_equal(
        credit.asked, [[name in NAMES[row.task] for row in rows] for name in ("red", "blue", "green")]
    )


def one_device() -> Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


def make_scoring(folder: Path, comparison: Comparison, most_failed: float = 1.0) -> Scoring:
    return Scoring(make_world(), one_device(), comparison, Decoding(), most_failed, Journal(folder, 0), "")


CASES = [("global", 5.0, False), ("group", 1.2, False), ("global", 5.0, True)]


@pytest.mark.parametrize(("normalise", "clip", "merged"), CASES)
def test_credit_is_a_loops(normalise: str, clip: float, merged: bool, tmp_path: Path) -> None:
    """By pool and by program; where equal prompts are merged the first and third draw are one group."""
    comparison, rows, mesh = Comparison(normalise, clip, merged), drawn(merged), one_device()
    with contextlib.closing(make_scoring(tmp_path, comparison)) as host:
        credit, looks = host.finish(host.begin(0, jnp.asarray(latents()), rows))
        pictures = host.picture()
    check(credit, comparison, rows)
    scoring = make_traced_scoring(make_world(), mesh, comparison, Decoding(), count=5)
    found, seen = jax.jit(scoring.credit)(scoring.params(), jnp.asarray(latents()), scoring.ask(rows))
    check(found, comparison, rows)
    np.testing.assert_array_equal(found.task, credit.task)
    np.testing.assert_array_equal(found.task, np.array(TASKS) == "counting")
    with contextlib.closing(make_scoring(tmp_path, comparison)) as host:
        assert host.finish_within(0, rows, found, seen) == looks
        np.testing.assert_array_equal(host.picture()["rollouts"], pictures["rollouts"])


def test_what_a_program_could_not_score_is_counted_as_what_the_host_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red is asked of 15 images a step, the first task's 9 first."""
    monkeypatch.setattr(pool, "LEAST", 24)
    scoring = make_traced_scoring(make_world(), one_device(), Comparison(), Decoding(), count=5)
    rows = drawn(merged=False)
    found, seen = jax.jit(scoring.credit)(scoring.params(), jnp.asarray(latents()), scoring.ask(rows))
    errors = []
    for within in (False, True):
        with contextlib.closing(make_scoring(tmp_path, Comparison(), most_failed=0.1)) as host:
            steps = (
                (lambda step: host.finish_within(step, rows, found, seen)) if within
                else (lambda step: host.finish(host.begin(step, jnp.asarray(latents()), rows)))
            )  # fmt: skip
            steps(0)  # these are too few to count
            with pytest.raises(TooManyFailures, match=r"rewards\.red: 12% of its last 24 scores failed") as error:
                steps(1)
            errors.append(str(error.value).partition(", most often")[0])
    assert errors[0] == errors[1]


def test_an_image_of_a_program_that_is_not_finite_is_refused_by_its_prompt(tmp_path: Path) -> None:
    scoring, x = make_traced_scoring(make_world(), one_device(), Comparison(), Decoding(), count=5), latents()
    x[10, 2, 1, 1] = np.inf
    rows = drawn(merged=False)
    found, seen = jax.jit(scoring.credit)(scoring.params(), jnp.asarray(x), scoring.ask(rows))
    with contextlib.closing(make_scoring(tmp_path, Comparison())) as host:
        with pytest.raises(ValueError, match="images: 1 of 15 are not finite, the first of prompt 'c'"):
            host.finish_within(0, rows, found, seen)
        with pytest.raises(ValueError, match="images: 1 of 15 are not finite, the first of prompt 'c'"):
            host.begin(0, jnp.asarray(x), rows)


def test_what_cannot_be_traced_is_told() -> None:
    world = make_world()
    assert is_traceable(world)
    assert not is_traceable(dataclasses.replace(world, decoder=None))
    rewards = {**world.rewards, "blue": dataclasses.replace(world.rewards["blue"], traced=None)}
    world = dataclasses.replace(world, rewards=rewards)
    assert not is_traceable(world)
    mesh = one_device()
    with pytest.raises(ValueError, match=r"rewards\.blue: has no form within a program"):
        make_traced_scoring(world, mesh, Comparison(), Decoding(), 5)
