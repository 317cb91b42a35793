"""Command lines: the flag that all programs share, and absl's parser with every mistake told in one line."""

import sys

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: file.py[:variant].", lock_config=True)


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


def _one_line(message: object) -> str:
    """The message, or what the traceback in it ends with: ml_collections quotes one where a config file raises."""
    text = str(message).strip()
    return text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())
