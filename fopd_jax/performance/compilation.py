"""One compilation of an update: how long it took, what memory it needs, or by how much that exceeds the chip's."""

import dataclasses
import re
import time

import jax

from fopd_jax.performance.problem import AbstractUpdate
from fopd_jax.performance.program import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Of two messages; what the first one calls temporaries holds the arguments, too.
_NEEDED = re.compile(r"(?:memory required for HLO temporaries \(|Used )([\d.]+)([KMGT]?)(?:\)| of )")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. `temporaries` is the peak; outputs that reuse a donated argument count once."""

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compilation:
    """`memory` and `text` (optimized HLO) of a program that fits; `needed` is known of one that does not, too."""

    lower_seconds: float
    compile_seconds: float
    needed: int
    memory: Memory | None
    text: str

    @property
    def fits(self) -> bool:
        return self.memory is not None


def compile_update(update: AbstractUpdate | Program) -> Compilation:
    """Lower and compile; a program too large for the chip's memory is an answer.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason.
    """
    began = time.perf_counter()
    lowered = update.step.lower(*update.arguments)
    lower_seconds = time.perf_counter() - began
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        return Compilation(lower_seconds, time.perf_counter() - began, needed, None, "")
    seconds = time.perf_counter() - began
    memory = memory_of(compiled.memory_analysis())
    return Compilation(lower_seconds, seconds, memory.total, memory, compiled.as_text())


def memory_of(found) -> Memory:
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def needed_bytes(message: str) -> int:
    """What a program needs in all, by the compiler's message of why it does not fit.

    Raises:
      ValueError: the message tells of something else.
    """
    found = _NEEDED.search(message)
    if found is None:
        raise ValueError(f"the compiler failed: {message.splitlines()[0]}")
    return int(float(found.group(1)) * _UNITS[found.group(2)])
