"""Teachers' demonstrations with a sampler in the network's place: killed anywhere, they end in the same bytes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fopd_jax.config.parse import assign, resolve
from fopd_jax.config.schema import RewardConfig
from fopd_jax.evaluation.sampler import Sampler
from fopd_jax.stages import demonstrations
from fopd_jax.stages.demonstrations import Wanted, demonstrate, sample_seed, with_tasks
from fopd_jax.stages.files import input_files
from fopd_jax.stages.flow_matching import plan_flow_matching
from fopd_jax.tasks.demonstrations import Demonstrations
from tests.configs import load

WANTED = Wanted(per_task=7, shard_rows=3)


class Stub:
    """Draws noise of its keys; counts what it is asked."""

    broken = False

    def __init__(self, latent_shape: tuple[int, int, int], traced: bool) -> None:
        self.latent_shape, self.traced, self.asked = latent_shape, traced, 0

    def __call__(self, variables: Any, adapter: Any, conditioning: Any, null: Any, keys: Any) -> Any:
        self.asked += len(keys)
        drawn = jax.vmap(lambda key: 0.9 * jnp.tanh(jax.random.normal(key, self.latent_shape)))(keys)
        if self.broken:
            drawn = drawn.at[1, 0, 0, 0].set(jnp.inf)
        return (drawn, (drawn[:, None], 2 * drawn[:, None])) if self.traced else drawn


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    made: list[Stub] = []

    def sampler(config: Any, pipeline: Any, traced: bool, guidance: float) -> Sampler:
        made.append(Stub(pipeline.world.latent_shape, traced))
        return Sampler(made[-1], guided=False, mesh=pipeline.mesh)

    monkeypatch.setattr(demonstrations, "_sampler", sampler)
    monkeypatch.setattr(demonstrations, "load_base", lambda *args: {})
    return made


def brightness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """Of images that are not too dark to be judged."""
    mean = images.astype(np.float64).mean((1, 2, 3)) / 255
    return np.where(mean < 0.497, np.nan, mean)


def _config(**changes: Any) -> Any:
    config = load()
    assign(config, {"eval.batch_size": 2, "eval.num_steps": 1} | changes)
    return config


def _rewarded() -> Any:
    config = _config(**{"run.max_failed_rewards": 1.0})
    config.rewards = {"bright": RewardConfig(kind="tests.stages.test_demonstrations:brightness")}
    for task in config.tasks.values():
        task.rewards = {"bright": 2.0}
    return resolve(config)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _rows(folder: Path, task: str) -> list[dict[str, Any]]:
    found = Demonstrations(folder, task, "f")
    return found.rows(range(len(found)))


def test_a_sample_is_a_function_of_prompt_and_number_alone(stubs: list[Stub], tmp_path: Path):
    config = resolve(_config())
    for name, wanted in (("a", WANTED), ("b", Wanted(per_task=5, shard_rows=4))):
        demonstrate(config, tmp_path / name, wanted)
    first, second = (_rows(tmp_path / name, "text") for name in "ab")
    assert (len(first), len(second)) == (7, 5)
    for one, other in zip(first, second, strict=False):
        assert one["prompt"] == other["prompt"]
        assert one["seed"] == other["seed"] == sample_seed(config.seed, "text", one["id"], 0)
        np.testing.assert_array_equal(one["latents"], other["latents"])
        key = jax.random.key(one["seed"])
        np.testing.assert_allclose(one["latents"], 0.9 * jnp.tanh(jax.random.normal(key, (24, 24, 3))), rtol=1e-6)
        assert np.isnan(one["score"])
    assert len({row["id"] for row in first}) == 7
    assert len({row["seed"] for name in ("text", "composition") for row in _rows(tmp_path / "a", name)}) == 14


def test_killed_at_any_shard_it_goes_on_to_the_same_bytes(
    stubs: list[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, write = resolve(_config()), demonstrations.write_shard
    demonstrate(config, tmp_path / "straight", dataclasses.replace(WANTED, trajectories=True))
    straight, drawn = _bytes(tmp_path / "straight"), sum(each.asked for each in stubs)
    stubs.clear()
    for number in range(6):

        def killed(folder: Path, shard: Any, *rest: Any, number: int = number) -> None:
            if shard.number == number:
                (folder / ".demonstrations-train.x.tmp").write_bytes(b"half")
                raise KeyboardInterrupt
            write(folder, shard, *rest)

        monkeypatch.setattr(demonstrations, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            demonstrate(config, tmp_path / "killed", dataclasses.replace(WANTED, trajectories=True))
        assert not (tmp_path / "killed" / "dataset_info.json").exists()
    monkeypatch.setattr(demonstrations, "write_shard", write)
    demonstrate(config, tmp_path / "killed", dataclasses.replace(WANTED, trajectories=True))
    assert _bytes(tmp_path / "killed") == straight
    assert sum(each.asked for each in stubs) < 2.1 * drawn  # what was there was not drawn again
    stubs.clear()
    demonstrate(config, tmp_path / "killed", dataclasses.replace(WANTED, trajectories=True))
    assert not stubs
    row = _rows(tmp_path / "killed", "text")[0]
    np.testing.assert_array_equal(row["states"][0], row["latents"])
    np.testing.assert_array_equal(row["velocities"][0], 2 * row["latents"])
    np.testing.assert_array_equal(row["sigmas"], [1.0])


def test_the_best_of_several_is_kept_and_what_fails_is_listed(stubs: list[Stub], tmp_path: Path):
    config = _rewarded()
    shards = demonstrate(config, tmp_path / "set", dataclasses.replace(WANTED, best_of=3))
    failed = [bad for shard in shards for bad in shard["failed"]]
    kept, expected, unscored = 0, {}, 0
    for task in config.tasks:
        for row in _rows(tmp_path / "set", task):
            images = []
            for sample in range(3):
                key = jax.random.key(sample_seed(config.seed, task, row["id"], sample))
                images.append(np.asarray(0.9 * jnp.tanh(jax.random.normal(key, (24, 24, 3)))))
            pixels = np.clip((np.stack(images) + 1) * 127.5, 0, 255).round().astype(np.uint8)
            scores = 2 * brightness(pixels, None, None)
            unscored += int(np.isnan(scores).sum())
            expected[task, row["id"]] = best = int(np.nanargmax(scores))
            assert row["sample"] == best
            assert row["score"] == pytest.approx(scores[best], rel=1e-6)
            np.testing.assert_allclose(row["latents"], images[best], rtol=1e-6)
            kept += 1
    lost = 14 - kept
    assert len(failed) == unscored + 3 * lost
    assert unscored > 0  # else the test would prove nothing
    assert all("error" in bad and bad["error"] for bad in failed)
    assert np.mean([shard["score"] for shard in shards]) > 1.0


def test_what_is_not_finite_is_never_written(stubs: list[Stub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Stub, "broken", True)
    said = r"images: 1 of 3 are not finite, the first of task \w+, prompt '.*', seed \d+"
    with pytest.raises(ValueError, match=said):
        demonstrate(resolve(_config()), tmp_path / "set", WANTED)
    assert not list((tmp_path / "set").glob("*array_record*"))


@pytest.mark.parametrize(
    ("changes", "wanted", "message"),
    [
        (
            {},
            {"best_of": 2},
            r"--best-of: found 2, but nothing scores 'composition': expected tasks\.composition\.rewards",
        ),
        ({"tasks.text.teacher": "nowhere"}, {}, r"tasks\.text\.teacher: nowhere: no such file"),
    ],
)
def test_what_cannot_be_drawn_is_named(changes: Any, wanted: Any, message: str, stubs: list[Stub], tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        demonstrate(resolve(_config(**changes)), tmp_path / "set", dataclasses.replace(WANTED, **wanted))
    assert not (tmp_path / "set").exists()


def test_another_config_or_stage_is_refused(stubs: list[Stub], tmp_path: Path):
    demonstrate(resolve(_config()), tmp_path / "set", WANTED)
    there = _bytes(tmp_path / "set")
    with pytest.raises(ValueError, match=r"--out: .* with tasks\.text\.guidance = 1\.0, but here it is 4\.5"):
        demonstrate(resolve(_config(**{"tasks.text.guidance": 4.5})), tmp_path / "set", WANTED)
    assert _bytes(tmp_path / "set") == there
    with pytest.raises(ValueError, match="stage: found 'flow_matching', expected 'opd': its tasks name the teachers"):
        demonstrate(resolve(load("miniature_teacher", "text")), tmp_path / "other", WANTED)


def test_some_tasks_alone_and_the_base_where_there_is_no_teacher(stubs: list[Stub], tmp_path: Path):
    config = resolve(_config(**{"tasks.text.teacher": "", "tasks.text.guidance": None, "eval.guidance": 2.5}))
    demonstrate(with_tasks(config, ["text"]), tmp_path / "set", WANTED)
    claim = json.loads((tmp_path / "set" / "demonstrations.json").read_text())
    assert (claim["identity"]["tasks.text.teacher"], claim["identity"]["tasks.text.guidance"]) == ("", 2.5)
    assert not any("composition" in name for name in claim["identity"])
    with pytest.raises(ValueError, match="--tasks: found 'ocr', expected some of"):
        with_tasks(config, ["ocr"])


def test_flow_matching_trains_on_a_set_in_place_of_the_worlds_images(stubs: list[Stub], tmp_path: Path):
    """By what teachers drew, or by their velocities; the set's shards are inputs of the run."""
    demonstrate(resolve(_config()), tmp_path / "set", dataclasses.replace(WANTED, trajectories=True))
    changes = {"tasks.text.images": str(tmp_path / "set"), "batch_size": 4}
    pairs = {
        target: plan_flow_matching(resolve(load("miniature_sft", "text", **changes, target=target))).pairs
        for target in ("data", "velocity")
    }
    known = {row["prompt"]: row["latents"] for row in _rows(tmp_path / "set", "text")}
    told = [line.partition(": ")[2] for line in pairs["data"].describe(0, range(4))]
    data, velocity = (each.batch(0, np.arange(4)) for each in pairs.values())
    for line, x0, x, v in zip(told, data["x0"], velocity["x"], velocity["v"], strict=True):
        latents = next(latents for prompt, latents in known.items() if repr(prompt) == line)
        np.testing.assert_array_equal(x0, latents)
        np.testing.assert_array_equal((x, v), (latents, 2 * latents))
    assert set(pairs["data"].upto(100)) == known.keys()
    config = resolve(load("miniature_sft", "text", **changes))
    assert input_files(config)["tasks.text.images"] == tmp_path / "set"
    with pytest.raises(ValueError, match=r"target: found 'velocity', expected 'data': images have no teacher's"):
        plan_flow_matching(resolve(load("miniature_teacher", "text", target="velocity")))
