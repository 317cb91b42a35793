"""`python -m fopd_jax.demonstrate --config=configs/miniature.py --out=FOLDER [--per-task=N --best-of=4 …]`.

The teachers of a config's tasks draw for their own training prompts (a task without a teacher: the base), and what
they draw is kept as a tensorflow-datasets folder (extra `prompt-sets`, without TensorFlow) for stage `flow_matching` to
train on: `--config.tasks.NAME.images=FOLDER`. Rows hold prompt, task, metadata, id (the prompt's place), sample, seed,
score and latents; `--trajectories` adds the states and the teacher's guided velocities at all of the sampler's levels,
for `--config.target=velocity`. `demonstrations.json` says where all of it comes from.

The sampler is that of the config's `eval` (`--config.eval.num_steps=40 --config.eval.transition=dpm2 …`), some
`eval.batch_size` images at once; the guidance each teacher's own. Every prompt is drawn once, or `--per-task` so many,
the prompts in the order in which a run's epochs come; `--tasks` names some of the tasks. Tasks with rewards
(`--config.tasks.NAME.rewards.REWARD=1`) are scored, and `--best-of=4` keeps the best of four. A sample that is not
finite ends the program; one that cannot be scored is listed in `shard-*.json` and left out.

The same command goes on where a killed one stopped, with the same bytes in the end; another config is refused there.
Several processes draw together and share the shards to write, in a folder that all of them see.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from fopd_jax.exits import tell_interrupts

    tell_interrupts()
    from fopd_jax.config.help import answer_help

    answer_help(__file__)

from absl import app, flags, logging

from fopd_jax.config.flags import membership, parse_flags, read_config
from fopd_jax.console import say, speaks
from fopd_jax.exits import explained
from fopd_jax.files import local_path
from fopd_jax.parallel.distributed import failing_together, initialize
from fopd_jax.performance.kept_programs import keeping
from fopd_jax.stages.demonstrations import Wanted, demonstrate, tell, with_tasks

_OUT = flags.DEFINE_string("out", None, "Folder for the set; default demonstrations/<config.name>.")
_TASKS = flags.DEFINE_list("tasks", [], "Of the config's tasks those whose teachers draw; default all.")
_PER_TASK = flags.DEFINE_integer("per-task", None, "Draws a task; default one of each prompt.", lower_bound=1)
_BEST_OF = flags.DEFINE_integer(
    "best-of", 1, "Images a draw, of which the best is kept.", lower_bound=1, upper_bound=2**10
)
_TRAJECTORIES = flags.DEFINE_bool("trajectories", False, "Keep states and velocities at the sampler's levels, too.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "float16"), "Of what is kept.")
_SHARD = flags.DEFINE_integer(
    "shard-rows", 256, "Draws a shard, which is what a killed program loses.", lower_bound=1, upper_bound=2**20
)


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of every folder that is not its own
    with explained(speaks=speaks):
        config = read_config()
        out = local_path("--out", f"demonstrations/{config.name}" if _OUT.value is None else _OUT.value)
        initialize(*membership())
        wanted = Wanted(_PER_TASK.value, _BEST_OF.value, _TRAJECTORIES.value, _DTYPE.value, _SHARD.value)
        if _TASKS.value:
            config = with_tasks(config, _TASKS.value)
        with failing_together(), keeping(config.run.compiled):
            made = demonstrate(config, out, wanted)
        tell(out, made)
        say(f"see {out}; stage flow_matching trains on it by --config.tasks.NAME.images={out}")


if __name__ == "__main__":
    flags.declare_key_flag("config")  # for --help
    app.run(main, flags_parser=parse_flags)
