"""Cycles of a Pallas TPU kernel by its static schedule: the VLIW bundles of every loop's body times its trips.

The compiler issues one bundle a cycle. Its dump of a kernel (`*-final_bundles.txt`) lists them by address with all
branches; a loop ends in a test `scmp.ge counter, bound /* loop exit test */`. The loop over the grid is software
pipelined in three stages: it runs two turns more than the grid has steps, whose bodies are mostly jumped over, so it
counts for the grid's steps. Waits for DMA are not in a schedule; what a forward branch may jump over (blocks that
`pl.when` guards) counts in every turn, which can only be too much.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path

# A bundle's line; what a comment spreads over more lines follows it. Addresses are hexadecimal but for the first, 0.
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:")
_STARTS = re.compile(r"Start region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)(%p\w+)\) )?target = \$region(\d+)")
_EXIT = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder (%s\w+), (\S+) /\* loop exit test \*/")
_DEFINITION = re.compile(r"(%s\w+) = ([\w.]+) ([^/{};\n]*)")
_GUARD = re.compile(r"^\(!?%p\w+\), ")
_STORE = re.compile(r"%\w+ = sst \[smem:(\[#\w+\])\] (%s\w+)")
_GRID = re.compile(r"(%s\w+) = sphi [^/{};]*/\*[^*]*iteration index, stage = 0(?! iter)")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_STEPS = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)
_DUMP = re.compile(r"(\d+)-(.+)-\d+-final_bundles\.txt")
DELAY_SLOTS = 4
"""Bundles behind a branch that still run, on every TPU read so far."""
MOST_CORES = 2  # of one device, which share a grid
LABEL = "final_bundles"


@dataclasses.dataclass(frozen=True)
class Loop:
    """Addresses of its first and last bundle, delay slots included, and how often it turns each time it is entered."""

    first: int
    last: int
    trips: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`bundles`: of the text; `cycles`: of a run, loops multiplied out."""

    bundles: int
    loops: tuple[Loop, ...]

    @functools.cached_property
    def cycles(self) -> int:
        return sum(
            math.prod(loop.trips for loop in self.loops if loop.first <= address <= loop.last)
            for address in range(self.bundles)
        )


def dump_flags(folder: Path) -> str:
    """What in `LIBTPU_INIT_ARGS`, which is read when libtpu is loaded, has it leave schedules, and no more, there."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={LABEL}"


def find_dumps(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The newest dump of each of the named instructions, where there is one."""
    wanted, found = set(names), {}
    for path in folder.iterdir():
        match = _DUMP.fullmatch(path.name)
        if match and match.group(2) in wanted:
            found.setdefault(match.group(2), []).append((int(match.group(1)), path))
    return {name: max(paths)[1] for name, paths in found.items()}


def read_schedule(text: str, name: str) -> Schedule:
    """The schedule of the kernel `name` from the text of its dump.

    Raises:
      ValueError: the text holds no bundles, or a loop whose trips it does not tell; names the kernel and the loop.
    """
    bundles = _bundles(text)
    if not bundles:
        raise ValueError(f"kernel {name}: found no bundles in its dump")
    starts = {region: address for address, body in bundles.items() for region in _STARTS.findall(body)}
    tests = {test: (counter, bound) for test, counter, bound in _EXIT.findall(text)}
    values, loops = _Values(text), []
    for address, body in bundles.items():
        for negated, test, region in _BRANCH.findall(body):
            first = starts.get(region, address + 1)
            if first > address:
                continue
            if not negated or test not in tests:
                raise ValueError(f"kernel {name}: the loop at bundle {first:#x} has no exit test that is understood")
            trips = _trips(values, *tests[test], f"kernel {name}: the loop at bundle {first:#x}")
            loops.append(Loop(first, address + DELAY_SLOTS, trips))
    return Schedule(max(bundles) + 1, tuple(sorted(loops, key=lambda loop: (loop.first, -loop.last))))


def _bundles(text: str) -> dict[int, str]:
    """Each bundle's text by its address."""
    found: dict[int, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            lines = found.setdefault(int(match.group(1), 0), [])
        lines.append(line)
    return {address: "\n".join(lines) for address, lines in found.items()}


class _Values:
    """What scalar registers hold, as far as constants and the counters of loops go; a name is written once."""

    def __init__(self, text: str) -> None:
        self.definitions = {name: (opcode, rest) for name, opcode, rest in _DEFINITION.findall(text)}
        self.spilled: dict[str, set[str]] = {}
        for slot, register in _STORE.findall(text):
            self.spilled.setdefault(slot, set()).add(register)
        self.grid = set(_GRID.findall(text))
        self.stages = max(map(int, _STAGE.findall(text)), default=0)
        self.steps = {math.prod(int(each) for each in row.split(",")) for row in _STEPS.findall(text)}

    def constant(self, name: str) -> int | None:
        """Of a number as it is written, or of a register that holds one."""
        if re.fullmatch(r"\d+", name):
            return int(name)
        _, opcode, operands = self.source(name)
        return int(operands[0]) if opcode == "smov" and operands[0].isdigit() else None

    def source(self, name: str) -> tuple[str, str, list[str]]:
        """The register first written with what one holds, behind copies and spills to memory; by which instruction."""
        opcode, rest = self.definitions.get(name, ("", ""))
        operands = [each.strip() for each in _GUARD.sub("", rest.strip()).split(",") if each.strip()]
        behind = operands[0] if opcode == "smov" and operands and operands[0].startswith("%s") else ""
        if opcode == "sld" and (slot := re.fullmatch(r"\[smem:(\[#\w+\])\]", rest.strip())):
            stored = self.spilled.get(slot.group(1), set())
            behind = next(iter(stored)) if len(stored) == 1 else ""
        return self.source(behind) if behind else (name, opcode, operands)


def _trips(values: _Values, counter: str, bound: str, where: str) -> int:
    """Of a loop that counts up from a constant by a constant to a constant.

    Raises:
      ValueError: it does not; says where.
    """
    _, opcode, added = values.source(counter)
    step, register = _step(added) if opcode == "sadd.s32" else (None, "")
    phi, origin, initial = values.source(register)
    start = values.constant(initial[0]) if origin == "sphi" else None
    end = values.constant(bound)
    if start is None or end is None or not step:
        raise ValueError(f"{where} turns a number of times that is not a constant of the schedule, which counts none")
    trips = -(-(end - start) // step)
    if phi not in values.grid:
        return trips
    trips -= values.stages
    if values.steps and max(values.steps) not in {cores * trips for cores in range(1, MOST_CORES + 1)}:
        raise ValueError(f"{where} turns {trips} times, but its grid has {max(values.steps)} steps")
    return trips


def _step(operands: list[str]) -> tuple[int | None, str]:
    """A sum's constant and its register."""
    constants = [each for each in operands if each.isdigit()]
    registers = [each for each in operands if each.startswith("%s")]
    return (int(constants[0]), registers[0]) if len(constants) == len(registers) == 1 else (None, "")
