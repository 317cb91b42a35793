"""The bearer token that servers of rewards ask for: a secret, so no message says more of it than where it is from."""

import os
import re
import secrets
from pathlib import Path

from fopd_jax.files import write_private
from fopd_jax.reading import read_regular

VARIABLE = "FOPD_JAX_REWARD_TOKEN"
SHORTEST, LONGEST = 16, 4096


def find_token(file: str, field: str) -> str | None:
    """The token of a file, or without one of the environment; None where there is neither. `field` names the file.

    Raises:
      ValueError: the file cannot be read, or it or the variable holds no token; names it.
    """
    if not file:
        found = os.environ.get(VARIABLE)
        return None if found is None else _checked(found, f"${VARIABLE}")
    try:
        return _checked(read_regular(Path(file)).decode(errors="replace"), f"{field}: {file}")
    except OSError as error:
        raise ValueError(f"{field}: {file}: {error.strerror}") from error


def make_token(file: Path | None) -> str:
    """A new one, written to a new file that its owner alone can read, if one is named.

    Raises:
      OSError: the file cannot be written.
    """
    token = secrets.token_urlsafe(32)
    if file is not None:
        write_private(file, token + "\n")
    return token


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if not re.fullmatch(rf"[!-~]{{{SHORTEST},{LONGEST}}}", token):
        raise ValueError(
            f"{source}: holds no token, expected {SHORTEST} to {LONGEST} printable ASCII characters without spaces"
        )
    return token
