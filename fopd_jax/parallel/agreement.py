"""What processes tell one another beside their arrays, so that a problem on one of them is a problem of all.

It goes through the runtime's key-value store: no device takes part, so it may be done in a thread beside training, and
every wait has an end.
"""

import collections
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state

from fopd_jax.parallel.distributed import BARRIER_TIMEOUT_S, name_of, said_under

Result = TypeVar("Result")
_FOLDER = "fopd_jax/told"
_LEFT = "left: "  # before the word of a process that has given up waiting
_LONGEST_POLL_S = 0.2
WORK_S = 1800.0
"""How long `together` waits: until then, what processes do between two computations may take longer on one of them."""
_rounds: collections.Counter[str] = collections.Counter()  # by what it is about: all tell the same, equally often


def share(about: str, word: str, timeout_s: float = BARRIER_TIMEOUT_S) -> list[str]:
    """Every process's word, by process; all have to call it, with the same `about` and equally often.

    Raises:
      TimeoutError: some do not within `timeout_s`, or have given up waiting for this one; names them.
    """
    if jax.process_count() == 1:
        return [word]
    client: Any = global_state.client
    index, round_ = jax.process_index(), _rounds[about]
    _rounds[about] += 1
    client.key_value_set(f"{_place(about, round_)}{index}", word)
    deadline, pause = time.monotonic() + timeout_s, 0.005
    while missing := sorted(set(range(jax.process_count())) - (found := said_under(_place(about, round_))).keys()):
        if time.monotonic() > deadline:
            left = f"{_LEFT}{word or 'nothing is wrong there'}, has waited for {timeout_s:.0f} s"
            client.key_value_set(f"{_place(about, round_)}{index}", left, allow_overwrite=True)  # for the late
            names = ", ".join(map(name_of, missing))
            raise TimeoutError(f"{about}: {names} not there within {timeout_s:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_S)
    for process, other in found.items():
        if other.startswith(_LEFT):
            raise TimeoutError(f"{about}: {_named(process, other)}")
    if round_:  # all have left the one before
        client.key_value_delete(f"{_place(about, round_ - 1)}{index}")
    return [found[process] for process in sorted(found)]


def agree(about: str, problem: str, timeout_s: float = BARRIER_TIMEOUT_S) -> str:
    """What is wrong, here or else on the first other process that says something, which is named; empty if nothing is.

    Raises:
      TimeoutError: as `share`.
    """
    words = share(about, problem, timeout_s)
    return problem or next((_named(process, word) for process, word in enumerate(words) if word), "")


def together(about: str, act: Callable[[], Result], timeout_s: float = WORK_S) -> Result:
    """What `act` returns here. If it raises on one process, all raise, before any waits for that one in a computation.

    Raises:
      Exception: whatever `act` raised.
      RuntimeError: it raised on another process; says where, and what.
      TimeoutError: as `share`.
    """
    if jax.process_count() == 1:
        return act()
    try:
        result = act()
    except Exception as error:
        agree(about, f"{type(error).__name__}: {error}", timeout_s)
        raise
    if problem := agree(about, "", timeout_s):
        raise RuntimeError(problem)
    return result


def forget(about: str) -> None:
    """Take back the last word about something that is over: every process has told something later since."""
    if jax.process_count() > 1 and (rounds := _rounds.pop(about, 0)):
        client: Any = global_state.client
        client.key_value_delete(f"{_place(about, rounds - 1)}{jax.process_index()}")


def overheard(about: str) -> str:
    """What another process, which is waiting for this one, has said of it already; empty if nothing."""
    if jax.process_count() == 1:
        return ""
    words = said_under(_place(about, _rounds[about]))
    return next((_named(process, words[process]) for process in sorted(words) if words[process]), "")


def _place(about: str, round_: int) -> str:
    return f"{_FOLDER}/{about}/{round_}/"


def _named(process: int, word: str) -> str:
    return f"{name_of(process)}: {word.removeprefix(_LEFT)}"
