"""The next batch is made meanwhile; nothing else changes: not the batches, not their errors, and no thread stays."""

import threading
from contextlib import closing
from typing import Any

import pytest

from fopd_jax.running.prefetch import Prefetch

WAIT_S = 10.0


class Batches:
    """Makes batches, remembers which and in which thread, and can be told to fail at one or to wait at one."""

    def __init__(self, bad: int = -1, slow: int = -1) -> None:
        self.bad, self.slow = bad, slow
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.go_on, self.reached = threading.Event(), threading.Event()

    def __call__(self, i: int) -> str:
        self.threads.add(threading.current_thread().name)
        if i == self.slow:
            self.reached.set()
            assert self.go_on.wait(WAIT_S)
        if i == self.bad:
            raise ValueError(f"batch {i} is bad")
        self.made.append(i)
        return f"batch {i}"


def _alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_are_the_same_and_each_is_made_once():
    batches = Batches()
    with closing(Prefetch(batches, 5)) as prefetch:
        assert [prefetch(i) for i in range(5)] == [f"batch {i}" for i in range(5)]
    assert batches.made == [0, 1, 2, 3, 4]
    assert threading.current_thread().name not in batches.threads
    assert not _alive()


def test_the_next_batch_is_made_while_this_one_is_used():
    batches = Batches(slow=1)
    with closing(Prefetch(batches, 3)) as prefetch:
        assert prefetch(0) == "batch 0"
        assert batches.reached.wait(WAIT_S)  # nobody has asked for batch 1
        batches.go_on.set()
        assert prefetch(1) == "batch 1"


def test_nothing_is_made_beyond_the_last_step():
    """The prompts of a batch that no step takes were never encoded."""
    batches = Batches(bad=3)
    with closing(Prefetch(batches, 3)) as prefetch:
        assert [prefetch(i) for i in range(3)][-1] == "batch 2"
    assert batches.made == [0, 1, 2]


@pytest.mark.parametrize("order", [[7, 8, 9], [4, 5, 3, 6, 7], [2, 0, 9, 9, 8], [5, 5, 5]])
def test_any_order_gives_what_was_asked_for(order: list[int]):
    """A resumed run starts in the middle; a bad batch is made again to be kept."""
    with closing(Prefetch(Batches(), 10)) as prefetch:
        assert [prefetch(i) for i in order] == [f"batch {i}" for i in order]


def test_an_error_comes_with_its_own_batch_and_message():
    with closing(Prefetch(Batches(bad=2), 5)) as prefetch:
        assert [prefetch(i) for i in range(2)] == ["batch 0", "batch 1"]
        with pytest.raises(ValueError, match=r"^batch 2 is bad$"):
            prefetch(2)
        assert prefetch(3) == "batch 3"


def test_an_error_of_a_batch_that_nobody_asks_for_is_nobodys():
    with closing(Prefetch(Batches(bad=1), 5)) as prefetch:
        assert [prefetch(0), prefetch(4)] == ["batch 0", "batch 4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_stays_when_the_run_fails(error: Any):
    prefetch = Prefetch(Batches(), 5)

    def run() -> None:
        with closing(prefetch):
            prefetch(0)
            assert _alive()
            raise error

    with pytest.raises(error):
        run()
    assert not _alive()
