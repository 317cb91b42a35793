"""From a config to which teachers each prompt is taught by, and to what is told of it.

A classifier is trained by process 0, whose weights all others take, since processes that hold the same rows of a batch
must find the same to the last bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int

from fopd_jax.config.schema import OPD
from fopd_jax.config.stages import is_mixed, taught
from fopd_jax.parallel.agreement import share
from fopd_jax.parallel.distributed import is_main
from fopd_jax.policy.panel import RoutingTable
from fopd_jax.policy.routing import ClassifiedMixes, Mistakes, TaskMixes, Weights
from fopd_jax.tasks.classifier import PromptClassifier, train_classifier
from fopd_jax.tasks.sampling import chance
from fopd_jax.tasks.task import Task
from fopd_jax.worlds.prompt_stream import Mixes, Routes
from fopd_jax.worlds.world import World, select_tasks


@dataclasses.dataclass(frozen=True)
class Routed:
    """What a prompt stream asks: of hard routing `routes`, of several teachers a prompt `mixes`.

    `read(task, prompt)`: what networks read in a training prompt's place; None: the prompt. `told`: in words.
    """

    routes: Routes
    mixes: Mixes | None
    read: Callable[[str, str], str] | None
    told: str


def make_routing(config: OPD, world: World) -> Routed:
    """What a stream of training prompts needs to know of teachers; trains the classifier, where there is one.

    Raises:
      ValueError: settings that contradict each other, or a task that has too little for them; names the field.
    """
    _check(config)
    routing, names, read = config.routing, taught(config), _reader(config, world)
    mistakes = Mistakes(names, routing.wrong, config.seed)
    if routing.method == "classifier":
        tasks = select_tasks(world, names)
        classifier = _trained(tasks)
        found = _accuracy(classifier, tasks, lambda prompt: world.paraphrase(prompt, config.seed))
        mixes = ClassifiedMixes(classifier, routing.temperature, routing.top, mistakes)
        return Routed(_anywhere, mixes, read, f"{_told(config)}; {found}")
    teaches = {name: 1.0 for name in names if config.tasks[name].teacher or config.tasks[name].network}
    table = RoutingTable.of_tasks(teaches, None)
    if routing.method == "soft":
        return Routed(table.routes, TaskMixes(names, _weights(config), mistakes), read, _told(config))
    return Routed(lambda tasks, prompts: table.routes(mistakes(tasks, prompts), prompts), None, read, _told(config))


def asked(config: OPD) -> int:
    """Of how many teachers' adapters each sample is asked about; 1: of its task's own."""
    match config.routing.method:
        case "hard":
            return 1
        case "soft":
            return TaskMixes(taught(config), _weights(config)).asked
        case _:
            count = len(taught(config))
            return min(config.routing.top, count) or count


def _check(config: OPD) -> None:
    routing, names = config.routing, taught(config)
    named = {"mix": lambda task: task.mix, "noisy_mix": lambda task: task.noisy_mix}
    mixed = [f"tasks.{name}.{field}" for name, task in config.tasks.items() for field in named if named[field](task)]
    if mixed and routing.method != "soft":
        raise ValueError(f"{mixed[0]}: found weights, expected {{}}, or routing.method 'soft', which is taught by them")
    if routing.method == "soft" and not mixed:
        raise ValueError("routing.method: found 'soft', expected 'hard', or weights in some tasks.NAME.mix")
    for field, found, default in (("temperature", routing.temperature, 1.0), ("top", routing.top, 0)):
        if routing.method != "classifier" and found != default:
            raise ValueError(f"routing.{field}: found {found:g}, expected {default:g}: only 'classifier' has one")
    if routing.method == "classifier" and len(names) < 2:
        problem = f"found 'classifier', expected 'hard': tasks with a teacher are {names}, nothing to tell apart"
        raise ValueError(f"routing.method: {problem}")
    if routing.top > len(names):
        raise ValueError(f"routing.top: found {routing.top}, expected at most {len(names)}, the number of teachers")
    if routing.wrong and len(names) < 2:
        raise ValueError(f"routing.wrong: found {routing.wrong:g}, expected 0: there is no other teacher")
    if is_mixed(config) and (without := [name for name in config.tasks if name not in names]):
        problem = "found '', expected one: objective 'mixed' counts each prompt under its task's teacher"
        raise ValueError(f"tasks.{without[0]}.teacher: {problem}")


def _weights(config: OPD) -> dict[str, tuple[Weights, Weights]]:
    return {name: (task.mix, task.noisy_mix) for name, task in config.tasks.items()}


def _anywhere(tasks: Sequence[str], prompts: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Of prompts whose mix says where they go."""
    return np.zeros(len(prompts), np.int32)


def _reader(config: OPD, world: World) -> Callable[[str, str], str] | None:
    shares = {name: task.rewritten for name, task in config.tasks.items()}
    if not any(shares.values()):
        return None

    def read(task: str, prompt: str) -> str:
        if chance(config.seed, "rewritten", prompt) >= shares[task]:
            return prompt
        return world.paraphrase(prompt, config.seed)

    return read


# ---- the classifier


def _trained(tasks: Mapping[str, Task]) -> PromptClassifier:
    """By process 0; the others wait for its weights."""
    prompts = {name: task.train for name, task in tasks.items()}
    if jax.process_count() == 1:
        return train_classifier(prompts)
    mine = train_classifier(prompts).dump() if is_main() else ""
    return PromptClassifier.load(tuple(tasks), share("classifier of prompts", mine)[0])


def _accuracy(classifier: PromptClassifier, tasks: Mapping[str, Task], rewrite: Callable[[str], str]) -> str:
    """Of the held-out prompts, as they are and in other words."""
    held_out = {name: task.test for name, task in tasks.items() if task.test}
    count = len(dict.fromkeys(prompt for task in tasks.values() for prompt in task.train))
    begin = f"classifier, trained on {count:,} prompts"
    if not held_out:
        return f"{begin}, none are held out"
    plain = classifier.recalls(held_out)
    others = classifier.recalls({name: [rewrite(prompt) for prompt in each] for name, each in held_out.items()})
    each = ", ".join(f"{name} {plain[name]:.3f}, {others[name]:.3f} rewritten" for name in held_out)
    return f"{begin}, right about those held out: {_mean(plain)}, in other words {_mean(others)} ({each})"


def _mean(recalls: Mapping[str, float]) -> str:
    return f"{np.mean(list(recalls.values())):.3f}"


# ---- in words


def _told(config: OPD) -> str:
    routing, count, teachers = config.routing, asked(config), len(taught(config))
    likeliest = f"all {teachers} teachers" if count == teachers else f"the {count} likeliest of {teachers} teachers"
    parts = {
        "hard": ["each prompt by its task's teacher"],
        "soft": [f"each prompt by up to {count} of {teachers} teachers, by its task's weights"],
        "classifier": [f"each prompt by {likeliest}, in proportion, at temperature {routing.temperature:g}"],
    }[routing.method]
    if routing.wrong:
        parts.append(f"{routing.wrong:.1%} of the prompts taken for another task's")
    rewritten = [f"{task.rewritten:.1%} of {name}" for name, task in config.tasks.items() if task.rewritten]
    return ", ".join([*parts, *([f"rewritten: {', '.join(rewritten)}"] if rewritten else [])])


def is_told(config: OPD) -> bool:
    """Whether routing is more than each task's teacher for its prompts."""
    routing = config.routing
    return routing.method != "hard" or routing.wrong > 0 or any(task.rewritten for task in config.tasks.values())
