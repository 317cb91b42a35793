"""`python -m fopd_jax.rewards check --config=FILE.py [--reward=NAME,…]`, or `list`.

`check` has each reward that the config's tasks name prove itself before a run trusts it: on pictures with known answers
(a text and one wrong character, two objects and one, a clean picture and what noise leaves of it), and on what every
reward must do: a score for each image, in its range, the same again, whatever else is in the batch. It prints a table,
latency and images a second, and exits with 1 where anything does not hold. `--reward` names others, by their kinds or
by the config's names.

`list` prints which kinds of rewards there are, what each measures, its range, where it runs and what it needs.
"""

import sys

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

from collections.abc import Sequence

from absl import app, flags, logging

from fopd_jax.config.flags import membership, parse_flags, read_config
from fopd_jax.config.schema import RewardConfig
from fopd_jax.config.stages import StageConfig
from fopd_jax.console import align, progress, say, speaks
from fopd_jax.exits import RETRY, explained, leave, refuse
from fopd_jax.parallel.distributed import failing_together, initialize
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.rewards.cases import Case, cases_of, pictures_of
from fopd_jax.rewards.catalogue import rows
from fopd_jax.rewards.check import Proof, as_text, prove, verdict
from fopd_jax.rewards.registry import close_all, make_rewards
from fopd_jax.rewards.reward import Metadata
from fopd_jax.tasks.sources import read_set
from fopd_jax.worlds.embedded import EMBEDDED
from fopd_jax.worlds.miniature import cases as miniature
from fopd_jax.worlds.world import World

_REWARD = flags.DEFINE_list("reward", [], "Of check: rewards, joined by commas; default: those of the config's tasks.")

COMMANDS = ("check", "list")


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    with explained(speaks=speaks):
        config = read_config()
        initialize(*membership())
        with failing_together(), keeping(config.run.compiled):
            proofs = check(config, _REWARD.value or named(config))
        say(as_text(proofs))
    if problem := verdict(proofs):
        leave(f"error: {problem}", RETRY)


def named(config: StageConfig) -> list[str]:
    """The rewards that a config's tasks name, each once.

    Raises:
      ValueError: there is none.
    """
    found = dict.fromkeys(name for task in config.tasks.values() for name in task.rewards)
    if not found:
        raise ValueError("tasks: none names a reward; expected some, as --config.tasks.NAME.rewards.ocr=1, or --reward")
    return list(found)


def check(config: StageConfig, names: Sequence[str]) -> list[Proof]:
    """What was found of each reward.

    Raises:
      ValueError: one cannot be made; names its field.
    """
    world = EMBEDDED[config.model.preset]() if config.model.preset in EMBEDDED else None
    rewards = make_rewards(names, config.rewards, config.run.servers, world.rewards if world else {})
    proofs = []
    try:
        with progress("rewards", len(rewards), "rewards") as count:
            for name, reward in rewards.items():
                cases = _cases(config, name, world)
                proofs.append(prove(reward, cases, cases or _pictures(config, name, world)))
                count(1)
    finally:
        close_all(rewards)
    return proofs


def _cases(config: StageConfig, name: str, world: World | None) -> list[Case]:
    """What the reward must know, by its kind; the world's own have the world's pictures."""
    settings = config.rewards.get(name, RewardConfig())
    if world is not None and name in world.rewards and not settings.kind:
        return miniature.cases_of(name)
    kind = settings.kind or name
    return cases_of(settings.options.get("reward", name) if kind == "remote" else kind)


def _pictures(config: StageConfig, name: str, world: World | None) -> list[Case]:
    """For a reward of which nothing more is known: pictures under prompts of the tasks that name it."""
    tasks = [task for task, section in config.tasks.items() if name in section.rewards]
    if world is not None:
        own = world.tasks[tasks[0] if tasks else next(iter(world.tasks))]
        return miniature.pictures_of(own.test[:2])
    prompts: list[tuple[str, Metadata]] = []
    for task in tasks:
        if source := config.tasks[task].test:
            found = read_set(source, f"tasks.{task}.test", "test")
            prompts += zip(found.texts[:2], found.beside()[:2], strict=True)
    return pictures_of(prompts)


def _parse(argv: list[str]) -> list[str]:
    """The command, then flags as in every program."""
    command = argv[1] if len(argv) > 1 else ""
    if command not in COMMANDS:
        refuse(f"found {command!r}, expected one of {', '.join(COMMANDS)}, then flags; --help says more")
    if command == "list":
        if len(argv) > 2:
            refuse(f"list: found {' '.join(argv[2:])}, expected nothing more")
        say(align(rows()))
        sys.exit(0)
    return parse_flags([argv[0], *argv[2:]])


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=_parse)
