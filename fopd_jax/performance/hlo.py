"""What a compiled program's optimized HLO text tells: collectives with the loops around them, and estimated cycles."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
REDUCTIONS = ("all-reduce", "reduce-scatter")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\S.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COUNTER = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_TILED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESHED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, as each device sees it.

    `bytes`: the whole message, that is the operand, or an all-gather's result. `depth`: loops around it, `executions`:
    how often they run it in all (None where a loop's length is not static). `devices`: numbers in the mesh's order of
    the devices of one group, or of each (source, target) pair of a permutation; empty for all devices, None where
    they are spelled in an unknown way.
    """

    kind: str
    name: str
    bytes: int
    floating: bool
    depth: int
    executions: int | None
    devices: tuple[tuple[int, ...], ...] | None
    op_name: str

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes (name → length, in order) that it crosses; `("unknown",)` where its devices are."""
        if self.devices is None:
            return ("unknown",)
        if not self.devices:
            return tuple(name for name, length in mesh.items() if length > 1)
        lengths = tuple(mesh.values())
        places = [np.stack(np.unravel_index(group, lengths)) for group in self.devices]
        crossed = np.any([(place != place[:, :1]).any(1) for place in places], axis=0)
        return tuple(name for name, here in zip(mesh, crossed, strict=True) if here)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def op_name(self) -> str:
        """The scopes and the primitive that it was made from; may be empty."""
        found = _OP_NAME.search(self.rest)
        return found.group(1) if found else ""

    @property
    def cycles(self) -> int:
        """The TPU compiler's own estimate of one execution; 0 where it says nothing."""
        found = _CYCLES.search(self.rest)
        return int(found.group(1)) if found else 0

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing("(" + self.rest, 0)])

    @property
    def called(self) -> list[str]:
        """Computations that it runs, a loop's apart."""
        branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(self.rest) for name in found.split(",")]
        return [*_CALLED.findall(self.rest), *branches]


Program = dict[str, list[Instruction]]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where a run meets it.

    `around`: loops, fusions and other calls that it stands in, outermost first. `depth`: how many of them are loops;
    `executions`: how often they run it in all (None where a loop's length is not static).
    """

    instruction: Instruction
    around: tuple[Instruction, ...]
    depth: int
    executions: int | None


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimized HLO module's text (`compiled.as_text()`), in the order of the program.

    Raises:
      ValueError: the text has no entry computation.
    """
    program, entry = parse(text)
    sizes = {each.name: array_bytes(each.type) for body in program.values() for each in body}
    found: dict[tuple[str, str, int], Collective] = {}
    for visit in walk(program, entry):
        instruction, depth = visit.instruction, visit.depth
        kind = collective_kind(instruction.opcode)
        if kind is None:
            continue
        # An asynchronous collective may show up in each of the fusions that it runs beside: same channel, same place.
        channel = _CHANNEL.search(instruction.rest)
        key = (kind, channel.group(1) if channel else instruction.name, depth)
        found.setdefault(key, _collective(kind, instruction, sizes, depth, visit.executions))
    return list(found.values())


def estimated_cycles(text: str) -> int:
    """The TPU compiler's own estimate for one run of a module, loops multiplied out; 0 from other compilers.

    It says nothing of custom kernels and of gathers, and a loop without a static length counts as one trip.

    Raises:
      ValueError: the text has no entry computation.
    """
    return sum(each.instruction.cycles * (each.executions or 1) for each in walk(*parse(text)))


def parse(text: str) -> tuple[Program, str]:
    """Instructions by computation, in the order of the text, and the name of the entry.

    Raises:
      ValueError: the text has no entry computation.
    """
    program: Program = {}
    entry, body = "", []
    for line in _whole_lines(text):
        if header := _COMPUTATION.match(line):
            body = program.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            body.append(Instruction(found.group(1), *_split(found.group(2))))
    if not entry:
        raise ValueError("found no entry computation, expected the text of an optimized HLO module")
    return program, entry


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, an instruction's attributes that are spread over several (a kernel's metadata) joined to one."""
    begun = ""
    for line in text.splitlines():
        whole = begun + line
        opens = whole.endswith("{") and _INSTRUCTION.match(whole)
        begun = whole if opens or (begun and not line.startswith("}")) else ""
        if not begun:
            yield whole


def _split(line: str) -> tuple[str, str, str]:
    """`type opcode(operands), attributes` → its three parts; a tuple's type stands in parentheses."""
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    opcode, _, rest = line[end:].strip().partition("(")
    return line[:end], opcode, rest


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def walk(
    program: Program, name: str, around: tuple[Instruction, ...] = (), depth: int = 0, executions: int | None = 1
) -> Iterator[Visit]:
    """Every instruction of a computation with what is around it, through all computations that are called."""
    for each in program.get(name, []):
        yield Visit(each, around, depth, executions)
        inner = (*around, each)
        if loop := _LOOP.search(each.rest):
            trips = trip_count(program, each)
            inside = None if trips is None or executions is None else trips * executions
            for called in loop.groups():
                yield from walk(program, called, inner, depth + 1, inside)
        else:
            for called in each.called:
                yield from walk(program, called, inner, depth, executions)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """The compiler's own count, or the bound of a counter that starts at 0, which is what `lax.scan` makes."""
    if known := _TRIPS.search(loop.rest):
        return int(known.group(1))
    named = _LOOP.search(loop.rest)
    condition = program.get(named.group(1), []) if named else []
    bounds = [found for each in condition if (found := _COUNTER.match(f"{each.type} {each.opcode}({each.rest}"))]
    below = any("direction=LT" in each.rest for each in condition)
    return int(bounds[0].group(1)) if len(bounds) == 1 and below else None


def collective_kind(opcode: str) -> str | None:
    """The collective that an opcode begins; None: it is none."""
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


def _collective(
    kind: str, instruction: Instruction, sizes: dict[str, int], depth: int, executions: int | None
) -> Collective:
    rest, result = instruction.rest, array_bytes(instruction.type)
    given = sum(sizes.get(name, 0) for name in instruction.operands)
    gathered = result - given if instruction.opcode.endswith("-start") else result  # a start's type repeats operands
    return Collective(
        kind=kind,
        name=instruction.name,
        bytes=gathered if kind == "all-gather" else given,
        floating=any(letters in ("f", "bf") for letters, _, _ in _ARRAY.findall(instruction.type)),
        depth=depth,
        executions=executions,
        devices=_devices(rest),
        op_name=instruction.op_name,
    )


def array_bytes(spelled: str) -> int:
    """Bytes of a type's arrays, without the padding of the machine's layout."""
    bits = 0
    for letters, width, lengths in _ARRAY.findall(spelled):
        each = 8 if letters == "pred" else int(width or 0)
        bits += each * math.prod(_numbers(lengths))
    return bits // 8


def _numbers(spelled: str) -> list[int]:
    return [int(each) for each in spelled.split(",") if each]


def _devices(rest: str) -> tuple[tuple[int, ...], ...] | None:
    """The first group, or all pairs. Groups are listed, tiles of a transposed range, or axes of a mesh."""
    if pairs := _PAIRS.search(rest):
        return tuple(tuple(_numbers(each)) for each in re.findall(r"\{([\d,]+)\}", pairs.group(1)))
    if listed := _LISTED.search(rest):
        return (tuple(_numbers(re.findall(r"\{([\d,]+)\}", listed.group(1))[0])),)
    if tiled := _TILED.search(rest):
        groups, shape, order = (_numbers(each or "") for each in tiled.groups())
        return _first_row(_range(shape, order).reshape(groups))
    if meshed := _MESHED.search(rest):
        return _first_row(_mesh_groups(*meshed.groups()))
    return () if "replica_groups={}" in rest else None


def _mesh_groups(axes: str, order: str | None, chosen: str) -> np.ndarray:
    """Groups along the chosen axes of a mesh `'name'=length,…` over all devices, in order or reordered."""
    lengths = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    devices = _range([math.prod(lengths.values())], [])
    if order and (reordered := _ORDER.match(order)):
        devices = _range(*(_numbers(each or "") for each in reordered.groups()))
    elif order:
        devices = np.asarray(_numbers(order))
    names = list(lengths)
    inner = [names.index(name) for name in re.findall(r"'(\w+)'", chosen)]
    outer = [i for i in range(len(names)) if i not in inner]
    size = math.prod(lengths[names[i]] for i in inner)
    return devices.reshape(list(lengths.values())).transpose(outer + inner).reshape(-1, size)


def _range(shape: Sequence[int], order: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape).transpose(order or None)


def _first_row(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return (tuple(groups[0].tolist()),)
