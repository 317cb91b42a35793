"""What one compilation tells: its memory, or by the compiler's words what it would have needed."""

import jax
import jax.numpy as jnp
import pytest

from fopd_jax.performance.compilation import Memory, memory_of, needed_bytes
from fopd_jax.performance.topology import GIB


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.84G) "
            "exceeds available HBM (15.75G).",
            26.84,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.57G of 15.75G hbm. Exceeded hbm capacity by 4.82G.",
            20.57,
        ),
        ("Used 512.0M of 15.75G hbm", 0.5),
    ],
)
def test_the_compilers_refusals_are_read(message: str, expected: float):
    assert needed_bytes(message) == pytest.approx(expected * GIB)


def test_another_failure_is_passed_on_in_one_line():
    with pytest.raises(ValueError, match=r"^the compiler failed: INTERNAL: no such thing$"):
        needed_bytes("INTERNAL: no such thing\nmore\nlines")


def test_memory_counts_a_donated_output_once():
    found = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones(1024)).compile().memory_analysis()
    assert found is not None
    assert memory_of(found) == Memory(arguments=4096, outputs=0, temporaries=found.temp_size_in_bytes, code=0)
    assert memory_of(found).total == 4096 + found.temp_size_in_bytes
