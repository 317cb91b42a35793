"""Command lines: the flags that programs share, and absl's parser with every mistake told in one line."""

import sys

from absl import flags
from ml_collections import config_flags

from fopd_jax.parallel import distributed

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: file.py[:variant].", lock_config=True)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Of several processes: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num-processes", None, "Of several processes: how many there are.")
_PROCESS = flags.DEFINE_integer("process-id", None, "Of several processes: the number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", distributed.MODES, "Whether to look for a cluster that this process is in."
)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but a bad flag, a config file that is not there or a field that it lacks is one line too."""
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.keys()  # a config file that failed to load raises no sooner than when it is used
    except (AttributeError, KeyError) as error:
        reason = error.args[0]  # ml_collections wraps the one in the other
        reason = reason.args[0] if isinstance(reason, KeyError) else reason
        sys.exit(f"error: the config has no such field: {_one_line(reason)}")
    except (flags.Error, OSError) as error:
        sys.exit(f"error: {_one_line(error)}")
    return rest


def join_processes() -> None:
    """Become one of several processes, if the flags or a cluster say so; before any device is touched.

    Raises:
      ValueError, TimeoutError: as `distributed.initialize`.
    """
    distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, mode=_DISTRIBUTED.value)


def _one_line(message: object) -> str:
    """The message, or what the traceback in it ends with: ml_collections quotes one where a config file raises."""
    text = str(message).strip()
    return text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())
