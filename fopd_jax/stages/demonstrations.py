"""Teachers draw for their own training prompts, and what they draw is kept as a set to train on.

A sample is a function of the config's seed, its task, its prompt's place in the task and its number among that prompt's
samples; `fopd_jax.sample` draws the same from the prompt and the seed that stand in its row. Shards are made one after
the other, each from nothing but its draws, so that a program that was killed goes on with the first one that is missing
and leaves the same bytes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fopd_jax import __version__
from fopd_jax.adapters.lora import effective
from fopd_jax.config.parse import flatten, override, resolve, thaw
from fopd_jax.config.schema import OPD
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import progress, say
from fopd_jax.evaluation.sampler import Sampler, check_finite, refuse_broken
from fopd_jax.exits import naming
from fopd_jax.files import check_writable
from fopd_jax.flow.schedule import flow_match_sigmas
from fopd_jax.interop.files.tensor_files import hash_file
from fopd_jax.parallel.agreement import share, together
from fopd_jax.parallel.distributed import barrier, gather_rows, held_rows, is_main, warn
from fopd_jax.parallel.sharding import batch_sharding, batch_ways, filled
from fopd_jax.policy.velocity import Tree
from fopd_jax.rewards.combine import weighted_sum
from fopd_jax.rewards.pixels import to_pixels
from fopd_jax.rewards.pool import Pool
from fopd_jax.rewards.registry import close_all
from fopd_jax.running import lock
from fopd_jax.stages.cards import base_hash, check_card, read_source, settled
from fopd_jax.stages.opd_update import scale_of
from fopd_jax.stages.pipeline import (
    Pipeline,
    check_base,
    check_network,
    load_base,
    load_network,
    load_policy,
    make_pipeline,
    weight_path,
)
from fopd_jax.stages.rewards import furnish
from fopd_jax.stages.setup import eval_sampler
from fopd_jax.tasks.demonstrations import (
    Layout,
    Row,
    Shard,
    abouts,
    claim,
    cut,
    finish,
    finished,
    write_shard,
)
from fopd_jax.tasks.prompts import read_tasks
from fopd_jax.tasks.sampling import Walk
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.world import World, select_tasks

MAKING_TIMEOUT_S = 7200.0
_SETTINGS = (
    "seed", "model.preset", "model.dtype", "model.resolution", "model.t5_length", "model.shift", "eval.num_steps",
    "eval.transition", "eval.noise_level", "eval.batch_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wanted:
    """`per_task` draws (None: one of each training prompt), of each the best of `best_of` by the task's rewards.

    `trajectories`: states and velocities at the sampler's levels as well; `dtype`: of what is stored; `shard_rows`:
    draws a shard, which is what a program that is killed loses.
    """

    per_task: int | None = None
    best_of: int = 1
    trajectories: bool = False
    dtype: str = "float32"
    shard_rows: int = 256


@dataclasses.dataclass(frozen=True)
class Made:
    """Of `count` candidates this process's view: latents, what was met on the way, and what each is worth (NaN)."""

    latents: Float[np.ndarray, "n h w c"]
    seen: tuple[np.ndarray, ...]
    scores: Float[np.ndarray, " n"]
    reasons: list[str]


def demonstrate(config: StageConfig, out: Path, wanted: Wanted) -> list[dict[str, Any]]:
    """Make what is missing of a set, whole; returns what stands beside its shards.

    Raises:
      ValueError: names the flag, field or file that is wrong, before anything is compiled or written; or a sample that
        is not finite, before its shard is written.
      OSError: `out` cannot be written.
    """
    if not isinstance(config, OPD):
        raise ValueError(f"stage: found {config.stage!r}, expected 'opd': its tasks name the teachers")
    config = settled(config)
    pipeline = make_pipeline(config.model, config.run, partial(read_tasks, config.tasks))
    check_base(config.model, pipeline)
    tasks = select_tasks(pipeline.world, tuple(config.tasks))
    wants = {name for task in config.tasks.values() for name, weight in task.rewards.items() if weight}
    world = furnish(config, pipeline.world, (), wants)
    with contextlib.closing(_Closing(world)):
        tasks = {name: world.tasks[name] for name in tasks}
        _check_rewards(tasks, world, wanted)
        teachers = _check_teachers(config, pipeline)
        counts = {name: len(task.train) if wanted.per_task is None else wanted.per_task for name, task in tasks.items()}
        shards = cut(counts, wanted.shard_rows)
        layout = Layout(world.latent_shape, wanted.dtype, config.eval.num_steps if wanted.trajectories else 0)
        if is_main():
            check_writable(out, "--out")
            claim(out, _claimed(config, teachers, tasks, wanted, layout, len(shards)))
        barrier("the set is claimed")
        with lock.holding(out):
            _make(config, dataclasses.replace(pipeline, world=world), tasks, wanted, layout, shards, out)
    return abouts(out, len(shards))


def with_tasks(config: StageConfig, names: Sequence[str]) -> StageConfig:
    """The config with some of its tasks alone.

    Raises:
      ValueError: it has no such task; names it.
    """
    if unknown := [name for name in names if name not in config.tasks]:
        raise ValueError(f"--tasks: found {unknown[0]!r}, expected some of {', '.join(config.tasks)}")
    changed = thaw(config)
    changed.tasks = {name: task for name, task in changed.tasks.items() if name in names}
    return resolve(changed)


class _Closing:
    """The rewards of a world, to be closed."""

    def __init__(self, world: World) -> None:
        self._world = world

    def close(self) -> None:
        close_all(self._world.rewards)


def sample_seed(seed: int, task: str, place: int, sample: int) -> int:
    """Of the `sample`-th image of a task's prompt: 31 bits that nothing else decides."""
    digest = hashlib.sha256(f"{seed}/{task}/{place}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# ---- before anything long


def _check_rewards(tasks: Mapping[str, Task], world: World, wanted: Wanted) -> None:
    """Refuse to choose by rewards that are not there, and prompts that they can never score."""
    for name, task in tasks.items():
        if wanted.best_of > 1 and not task.weights:
            raise ValueError(
                f"--best-of: found {wanted.best_of}, but nothing scores {name!r}: expected tasks.{name}.rewards"
            )
        for reward in task.weights:
            with naming(f"tasks.{name}.rewards.{reward}"):
                world.rewards[reward].check(task.train, task.beside("train"))


def _check_teachers(config: OPD, pipeline: Pipeline) -> dict[str, str]:
    """Refuse teachers that are not there or are of another base; the hash of each one's file, '' of the base."""
    base, found = base_hash(config.model), {}
    for name, task in config.tasks.items():
        field = f"tasks.{name}.teacher"
        if task.network:
            raise ValueError(
                f"tasks.{name}.network: found {task.network!r}, expected '': sets are drawn by teachers on the base"
            )
        if task.teacher and config.whole_teachers:
            check_network(field, task.teacher, pipeline)
        elif task.teacher:
            check_card(field, task.teacher, read_source(field, task.teacher), pipeline, base)
            with naming(field):
                load_policy(task.teacher, pipeline)
        found[name] = _hash(weight_path(task.teacher)) if task.teacher else ""
    return found


def _hash(path: Path) -> str:
    """Of a file, or of a folder's tensor files."""
    if path.is_file():
        return hash_file(path)
    parts = [f"{each.relative_to(path)} {hash_file(each)}" for each in sorted(path.rglob("*.safetensors"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _claimed(
    config: OPD, teachers: Mapping[str, str], tasks: Mapping[str, Task], wanted: Wanted, layout: Layout, shards: int
) -> dict[str, Any]:
    """What a set says of itself; its `identity` is what makes it this set and no other."""
    fields = flatten(config)
    identity: dict[str, Any] = {name: fields[name] for name in _SETTINGS}
    identity |= {"base": base_hash(config.model), "whole_teachers": config.whole_teachers}
    for name in config.tasks:
        prompts = json.dumps([tasks[name].train, tasks[name].beside("train")], sort_keys=True, default=str)
        about = {
            "teacher": teachers[name], "guidance": guidance_of(config, name), "rewards": dict(tasks[name].weights),
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        }  # fmt: skip
        identity |= {f"tasks.{name}.{field}": value for field, value in about.items()}
    identity |= {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(wanted).items()}
    return {
        "identity": identity,
        "shards": shards,
        "layout": [list(layout.latents), layout.dtype, layout.levels],
        "sources": {name: task.teacher or config.model.path for name, task in config.tasks.items()},
        "sigmas": flow_match_sigmas(config.eval.num_steps, config.model.shift).tolist(),
        "config": config.name,
        "versions": {"fopd_jax": __version__, "jax": jax.__version__},
    }


def guidance_of(config: OPD, name: str) -> float:
    """Under which scale a task's teacher draws: its own; of the base, where the task has none, that of evaluations."""
    task = config.tasks[name]
    return config.eval.guidance if task.guidance is None and not task.teacher else scale_of(task.guidance)


# ---- drawing


def _make(
    config: OPD, pipeline: Pipeline, tasks: Mapping[str, Task], wanted: Wanted, layout: Layout, shards: Sequence[Shard],
    out: Path,
) -> None:  # fmt: skip
    """Every shard that is not there, task by task, then what makes the folder a dataset."""
    there = json.loads(share("finished shards", json.dumps(finished(out, len(shards)) if is_main() else []))[0])
    missing = [shard for shard in shards if shard.number not in there]
    if there:
        say(f"{out}: {len(there)} of {len(shards)} shards are there")
    plans = {name: _Draws(config.seed, tasks[name], wanted) for name in tasks}
    asked = [plans[shard.task].prompts(shard) for shard in missing]
    pipeline.world.prepare(["", *dict.fromkeys(prompt for prompts in asked for prompt in prompts)])
    size = filled(min(config.eval.batch_size, wanted.shard_rows), batch_ways(pipeline.mesh))
    total = sum((shard.stop - shard.start) * wanted.best_of for shard in missing)
    rewards = {name: pipeline.world.rewards[name] for task in tasks.values() for name in task.weights}
    base = functools.cache(partial(load_base, config.model, pipeline, config.seed))
    sampler = functools.cache(partial(_sampler, config, pipeline, wanted.trajectories))
    with Pool(rewards, most_failed=config.run.max_failed_rewards) as pool, progress("draw", total, "images") as count:
        for name in tasks:
            own = [shard for shard in missing if shard.task == name]
            if not own:
                continue
            policy = _teacher(config, pipeline, name, base)
            draw = _drawer(pipeline.world, tasks[name], sampler(guidance_of(config, name)), policy, size, pool)
            for shard in own:
                rows, failed = _rows(plans[name], shard, draw, layout, config, count)
                if shard.number % jax.process_count() == jax.process_index():
                    write = partial(write_shard, out, shard, len(shards), layout, rows, failed)
                else:
                    write = _nothing
                together(f"shard {shard.number}", write)
    barrier("all shards are written", MAKING_TIMEOUT_S)
    if is_main():
        finish(out, len(shards), layout, f"What the teachers of {config.name} draw for their own training prompts.")
    barrier("the set is whole")


def _nothing() -> None:
    """Another process writes this one."""


@dataclasses.dataclass(frozen=True)
class _Draws:
    """A task's draws: which prompt, and which of its samples."""

    seed: int
    task: Task
    wanted: Wanted

    def places(self, shard: Shard) -> list[int]:
        return Walk(self.seed, self.task.name, len(self.task.train))(shard.start, shard.stop).tolist()

    def prompts(self, shard: Shard) -> list[str]:
        return [self.task.train[place] for place in self.places(shard)]

    def sample(self, draw: int, candidate: int) -> int:
        """The number of a candidate among all samples of its prompt."""
        return draw // len(self.task.train) * self.wanted.best_of + candidate


Draw = Callable[[Sequence[str], Sequence[int], Sequence[Mapping[str, Any]]], Made]


def _rows(
    draws: _Draws, shard: Shard, draw: Draw, layout: Layout, config: OPD, count: Callable[[int], Any]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """A shard's rows, the best candidate of each draw that has one with a score, and the samples that failed."""
    task, places = draws.task, draws.places(shard)
    beside = task.beside("train")
    best: dict[int, tuple[float, int, np.ndarray, tuple[np.ndarray, ...]]] = {}
    failed: list[dict[str, Any]] = []
    for candidate in range(draws.wanted.best_of):
        for chunk in _chunks(len(places), config.eval.batch_size):
            own = [places[i] for i in chunk]
            samples = [draws.sample(shard.start + i, candidate) for i in chunk]
            seeds = [sample_seed(config.seed, task.name, *each) for each in zip(own, samples, strict=True)]
            made = draw([task.train[place] for place in own], seeds, [beside[place] for place in own])
            for k, i in enumerate(chunk):
                score = float(made.scores[k])
                if task.weights and not np.isfinite(score):
                    failed.append({"id": own[k], "sample": samples[k], "seed": seeds[k], "error": made.reasons[k]})
                elif i not in best or score > best[i][0]:
                    best[i] = score, candidate, made.latents[k], tuple(each[k] for each in made.seen)
            count(len(chunk))
    levels = flow_match_sigmas(config.eval.num_steps, config.model.shift)[:-1]
    rows = []
    for i, (score, candidate, latents, seen) in sorted(best.items()):
        sample = draws.sample(shard.start + i, candidate)
        seed = sample_seed(config.seed, task.name, places[i], sample)
        row: Row = {
            "prompt": task.train[places[i]], "task": task.name, "id": places[i], "sample": sample, "seed": seed,
            "metadata": json.dumps(beside[places[i]], ensure_ascii=False, sort_keys=True), "score": np.float32(score),
            "latents": latents.astype(layout.dtype),
        }  # fmt: skip
        if layout.levels:
            states, velocities = (each.astype(layout.dtype) for each in seen)
            row |= {"sigmas": levels, "states": states, "velocities": velocities}
        rows.append(row)
    names = [f"task {task.name}, prompt {row['prompt']!r}, seed {row['seed']}" for row in rows]
    arrays = ("latents", "states", "velocities")
    refuse_broken(np.array([all(np.isfinite(row[a]).all() for a in arrays if a in row) for row in rows], bool), names)
    return rows, failed


def _chunks(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _teacher(config: OPD, pipeline: Pipeline, name: str, base: Callable[[], Tree]) -> tuple[Tree, Tree]:
    """Variables and effective adapter of a task's teacher; without one the base's, which all share."""
    source = config.tasks[name].teacher
    if source and config.whole_teachers:
        return load_network(source, pipeline, jnp.dtype(config.model.dtype)), {}
    return base(), effective(load_policy(source, pipeline)) if source else {}


def _drawer(world: World, task: Task, sampler: Sampler, policy: tuple[Tree, Tree], size: int, pool: Pool) -> Draw:
    """Prompts, seeds and metadata, `size` at most → what a teacher draws, the same on all processes."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], beside: Sequence[Mapping[str, Any]]) -> Made:
        surplus = size - len(prompts)
        whole, own = [*prompts, *[prompts[-1]] * surplus], [*seeds, *[seeds[-1]] * surplus]
        keys = jax.vmap(jax.random.key)(jnp.asarray(own, jnp.uint32))
        drawn = sampler.latents(world, *policy, whole, keys)
        latents, *seen = jax.tree.leaves(jax.tree.map(held_rows, drawn))
        scores, reasons = np.full(len(latents), np.nan), [""] * len(latents)
        if task.weights:
            mine = [int(row) for row in sampler.rows(size)]
            about = [beside[min(row, len(beside) - 1)] for row in mine]
            score = partial(_score, pool, task, world, latents, [whole[row] for row in mine], about)
            scores, reasons = together(f"scores of {task.name}", score)
        found = {"latents": latents, "scores": scores, **{f"seen{k}": each for k, each in enumerate(seen)}}
        gathered = gather_rows(found, batch_sharding(sampler.mesh), size)
        told = [json.loads(each) for each in share("reasons", json.dumps(_by_row(sampler, size, reasons)))]
        words = {int(row): reason for each in told for row, reason in each.items()}
        met = tuple(gathered[f"seen{k}"] for k in range(len(seen)))
        return Made(gathered["latents"], met, gathered["scores"], [words.get(row, "") for row in range(size)])

    return draw


def _by_row(sampler: Sampler, size: int, reasons: Sequence[str]) -> dict[int, str]:
    return {int(row): reason for row, reason in zip(sampler.rows(size), reasons, strict=True) if reason}


def _score(
    pool: Pool,
    task: Task,
    world: World,
    latents: Float[np.ndarray, "n h w c"],
    prompts: Sequence[str],
    beside: Sequence[Mapping[str, Any]],
) -> tuple[Float[np.ndarray, " n"], list[str]]:
    """The task's own reward of each image, NaN with the reason where it has none."""
    images = world.decode(latents)
    check_finite(images, [f"prompt {prompt!r}" for prompt in prompts])
    found = weighted_sum(pool.submit(to_pixels(images), prompts, beside, list(task.weights)).result(), task.weights)
    return np.asarray(found.values, np.float64), [str(each.get("error", "")) for each in found.details]


def _sampler(config: OPD, pipeline: Pipeline, traced: bool, guidance: float) -> Sampler:
    evaluation = override(config, {"eval.guidance": guidance}).eval
    return eval_sampler(evaluation, config.model.shift, pipeline, traced=traced)


def tell(out: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """What a set holds, and what failed."""
    for task in dict.fromkeys(each["task"] for each in shards):
        own = [each for each in shards if each["task"] == task]
        rows, failed = sum(each["rows"] for each in own), [bad for each in own for bad in each["failed"]]
        scored = [(each["score"], each["rows"]) for each in own if each["score"] is not None]
        mean = sum(score * count for score, count in scored) / max(sum(count for _, count in scored), 1)
        say(f"{task}: {rows:,} demonstrations" + (f", mean score {mean:.3f}" if scored else ""))
        if failed:
            warn(f"{task}: {len(failed)} samples could not be scored, such as seed {failed[0]['seed']}: "
                 f"{failed[0]['error']}; they are listed in {out}/shard-*.json")  # fmt: skip
