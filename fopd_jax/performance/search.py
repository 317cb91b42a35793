"""The largest batch that fits, in few compilations: what a program needs grows almost linearly with its batch."""

from collections.abc import Callable

Trial = tuple[bool, int]
"""Whether a batch fits, and the bytes that it needs either way."""


def largest_fitting(attempt: Callable[[int], Trial], start: int, capacity: int) -> tuple[int, dict[int, Trial]]:
    """The largest batch per chip that was tried and fits (0: none is known), and all trials.

    Two trials draw a line, and a third proves what it predicts. Where that one does not fit, or leaves room for more,
    the line through the two trials nearest to the limit predicts again; a batch that was tried ends the search.
    """
    trials = {start: attempt(start)}
    batch = start * 2 if trials[start][0] else start // 2
    while batch and batch not in trials:
        trials[batch] = attempt(batch)
        batch = _predict(trials, capacity)
    return max((batch for batch, (fits, _) in trials.items() if fits), default=0), trials


def _predict(trials: dict[int, Trial], capacity: int) -> int:
    """Where the line through the two nearest trials reaches the limit, between the bounds that trials have proven."""
    low = max((batch for batch, (fits, _) in trials.items() if fits), default=0)
    high = min((batch for batch, (fits, _) in trials.items() if not fits), default=None)
    nearest = sorted(trials, key=lambda batch: (abs(trials[batch][1] - capacity), -batch))
    a, b = sorted(nearest[:2])
    slope = (trials[b][1] - trials[a][1]) / (b - a)
    guess = int(a + (capacity - trials[a][1]) / slope) if slope > 0 else 2 * b
    return max(low, guess if high is None else min(guess, high - 1))
