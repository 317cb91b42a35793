"""The same update in several sizes: batches up to the largest that fits, and banks of more and more teachers."""

import dataclasses
import itertools
from collections.abc import Iterator

from jax.sharding import Mesh

from fopd_jax.config.schema import OPD
from fopd_jax.config.variants import with_batch, with_teachers
from fopd_jax.performance.measure import Options, measure
from fopd_jax.performance.timing import MatmulPeak
from fopd_jax.stages.problem import Fields, make_problem

MOST_STEPS = 3  # of each batch: large ones take long, and their steps differ little
TEACHERS = (1, 2, 4, 8)


def sweep_batches(config: OPD, mesh: Mesh, matmul: MatmulPeak, options: Options) -> Iterator[Fields]:
    """Twice the config's batch, then double that, on and on; ends with the first that does not fit."""
    steps = min(options.steps, MOST_STEPS)
    for doublings in itertools.count(1):
        sized = with_batch(config, config.batch_size << doublings)
        yield (found := measure(make_problem(sized, mesh), matmul, dataclasses.replace(options, steps=steps)))
        if not found["fits"]:
            return


def sweep_teachers(config: OPD, mesh: Mesh, matmul: MatmulPeak, options: Options) -> Iterator[Fields]:
    """The same batch routed to 1, 2, 4 and 8 teachers."""
    for count in TEACHERS:
        yield measure(make_problem(with_teachers(config, count), mesh), matmul, options)
