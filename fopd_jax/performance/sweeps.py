"""The same update in several sizes: batches up to the largest that fits, and banks of more and more teachers."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from fopd_jax.performance.measure import Options, measure
from fopd_jax.performance.problem import Fields, Problem
from fopd_jax.performance.timing import MatmulPeak

MOST_STEPS = 3  # of each batch: large ones take long, and their steps differ little
TEACHERS = (1, 2, 4, 8)


def sweep_batches(make: Callable[[int], Problem], first: int, matmul: MatmulPeak, options: Options) -> Iterator[Fields]:
    """Twice the batch `first`, then double that, up to the first that does not fit; `make(batch size)`."""
    steps = min(options.steps, MOST_STEPS)
    for doublings in itertools.count(1):
        yield (found := measure(make(first << doublings), matmul, dataclasses.replace(options, steps=steps)))
        if not found["fits"]:
            return


def sweep_teachers(make: Callable[[int], Problem], matmul: MatmulPeak, options: Options) -> Iterator[Fields]:
    """The same batch routed to 1, 2, 4 and 8 teachers; `make(number of teachers)`."""
    for count in TEACHERS:
        yield measure(make(count), matmul, options)
