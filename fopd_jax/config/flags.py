"""Command lines: the flags that programs share, and absl's parser with every mistake told in one line."""

import dataclasses
import difflib
import re
import sys

from absl import flags
from ml_collections import config_flags

from fopd_jax.config import schema
from fopd_jax.config.parse import current_name, resolve
from fopd_jax.config.schema import OPD, Config, FlowMatching
from fopd_jax.config.show import describe

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: file.py[:variant].")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Of several processes: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num-processes", None, "Of several processes: how many there are.")
_PROCESS = flags.DEFINE_integer("process-id", None, "Of several processes: the number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ("auto", "off"), "Whether to look for a cluster that this process is in."
)
_FIELD = "--config."
_MISSING = re.compile(r"Field (\w+) not found on dataclass <class '[\w.]+\.(\w+)'>")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but a bad flag, a config file that is not there or a field that it lacks is one line too.

    Fields may go by the names that they had in earlier versions.
    """
    sys.argv[:], argv = map(_current, sys.argv), list(map(_current, argv))  # ml_collections looks at sys.argv
    try:
        rest = flags.FLAGS(argv)
        getattr(CONFIG.value, "stage", None)  # a config file that failed to load raises no sooner than when it is used
    except (AttributeError, KeyError) as error:
        reason = error.args[0]  # ml_collections wraps the one in the other
        reason = reason.args[0] if isinstance(reason, KeyError) else reason
        sys.exit(f"error: the config has no such field: {_missing(_one_line(reason))}")
    except (flags.Error, OSError) as error:
        sys.exit(f"error: {_one_line(error)}")
    return rest


def read_config() -> OPD | FlowMatching:
    """The config of the command line, checked and frozen; to be called once.

    Raises:
      ValueError: as `resolve`.
    """
    return resolve(CONFIG.value)


def describe_config(config: Config) -> str:
    """The whole config with where each value comes from, see `show.describe`."""
    return describe(config, config_flags.get_override_values(flags.FLAGS["config"]))


def membership() -> tuple[str | None, int | None, int | None, str]:
    """Coordinator, number of processes, number of this one and mode, for `distributed.initialize`."""
    return _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DISTRIBUTED.value


def _current(argument: str) -> str:
    """A flag `--config.field[=value]` under the field's name of today."""
    if not argument.startswith(_FIELD):
        return argument
    name, equals, value = argument.removeprefix(_FIELD).partition("=")
    return f"{_FIELD}{current_name(name)}{equals}{value}"


def _one_line(message: object) -> str:
    """The message, or what the traceback in it ends with: ml_collections quotes one where a config file raises."""
    text = str(message).strip()
    return text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())


def _missing(message: str) -> str:
    """What ml_collections says of a field that a section lacks, with what is there in its place."""
    if (found := _MISSING.fullmatch(message)) is None:
        return repr(message)
    name, section = found.groups()
    known = [field.name for field in dataclasses.fields(getattr(schema, section))]
    close = difflib.get_close_matches(name, known, 1)
    return f"{name!r}, did you mean {close[0]!r}?" if close else f"{name!r}, only {', '.join(known)}"
