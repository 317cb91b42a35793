"""What a GPU's compiled program consists of: its kernels by kind, with the bytes and FLOPs of each.

An analysis of optimized HLO, not a measurement: nothing ran, and nothing was tuned. The compiler marks matrix products
for Triton; on a card it would time Triton's tiles against cuBLAS and keep the faster. Whether cuDNN accepts an
attention's graph shows on a card alone.

Bytes: what a kernel reads and writes in memory if it reads every operand once, of a slice the part that it takes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from fopd_jax.performance.hlo import Instruction, Program, array_bytes, parse, trip_count

ATTENTION = "__cudnn$fmha"
_GEMM = ("__cublas$",)
_NOT_KERNELS = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "add-dependency", "opt-barrier",
}  # fmt: skip
_MOVES = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "bitcast-convert", "broadcast", "concatenate",
    "convert", "copy", "dynamic-slice", "dynamic-update-slice", "gather", "iota", "pad", "reshape", "reverse", "slice",
    "transpose",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_COLLECTIVE = re.compile(r"^(all-|reduce-scatter|collective-|async-|send|recv)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_BACKEND_KIND = re.compile(r'"fusion_backend_config":\{"kind":"([^"]+)"')
_FUSION_KIND = re.compile(r"\bkind=k(\w+)")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LIBRARY_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_EPILOGUE = re.compile(r'"epilogue":"(\w+)"')
_SCRATCH = re.compile(r"\b[su]8\[[\d,]*\]")
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_FLOATS = ("f64", "f32", "bf16", "f16", "f8")
KINDS = ("matrix product", "attention", "triton", "reduction", "loop", "movement", "collective", "library")
"""`triton`: fusions of norms and the like. `loop`: elementwise. `movement`: nothing is computed, casts apart."""
BACKWARD_PRODUCTS = 2.5  # of flash attention: five matrix products where the forward has two


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instruction that is launched. `read`, `written`, `float32` (written of it): bytes of one launch.

    `launches`: in one run of the program, None in a loop whose length is unknown. `detail`: a custom call's target with
    what cuBLAS does besides (`BIAS_GELU`), or what the compiler calls the fusion. `feeds`: names of the kernels that
    its operands come from.
    """

    kind: str
    name: str
    detail: str
    launches: int | None
    read: int
    written: int
    float32: int
    flops: float
    op_name: str
    feeds: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def seconds(self, peak: float, bandwidth: float) -> float:
        """One launch at a card's peak rates, whichever takes longer."""
        return max(self.flops / peak, self.bytes / bandwidth)


def kernels(text: str) -> list[Kernel]:
    """All kernels of an optimized HLO module's text, in the order of the program.

    Raises:
      ValueError: the text has no entry computation.
    """
    program, entry = parse(text)
    return [_kernel(program, body, each, launches) for body, each, launches in _launched(program, entry, 1)]


def _launched(
    program: Program, name: str, launches: int | None
) -> Iterator[tuple[Mapping[str, Instruction], Instruction, int | None]]:
    """Instructions that are kernels, each with its computation's by name, through loops and calls."""
    body = {each.name: each for each in program.get(name, [])}
    for each in body.values():
        if each.opcode == "while":
            trips = trip_count(program, each)
            inside = None if trips is None or launches is None else trips * launches
            yield from _launched(program, _BODY.findall(each.rest)[0], inside)
        elif each.opcode in ("conditional", "call"):
            for called in each.called:
                yield from _launched(program, called, launches)
        elif each.opcode not in _NOT_KERNELS and not each.opcode.endswith(("-done", "-update")):
            yield body, each, launches


def _kernel(program: Program, body: Mapping[str, Instruction], each: Instruction, launches: int | None) -> Kernel:
    called = _CALLS.search(each.rest) if each.opcode == "fusion" else None
    inside = _flat(program, called.group(1)) if called else []
    operands = [body[name] for name in each.operands if name in body]
    read, written, float32 = _traffic(program, called.group(1), operands, each) if called else _plain(operands, each)
    types = {one.name: one.type for one in (*inside, *operands)}
    flops = sum(_product_flops(one, types) for one in (*inside, each)) + _attention_flops(each)
    return Kernel(
        kind=_kind(each, inside),
        name=each.name,
        detail=_detail(each),
        launches=launches,
        read=read,
        written=written,
        float32=float32,
        flops=flops,
        op_name=each.op_name,
        feeds=tuple(_source(body, one) for one in operands if array_bytes(one.type) > 0),
    )


def _flat(program: Program, name: str) -> list[Instruction]:
    """A fusion's instructions, those of fusions inside it included."""
    found = []
    for each in program.get(name, []):
        found.append(each)
        if inner := _CALLS.search(each.rest):
            found += _flat(program, inner.group(1))
    return found


def _detail(each: Instruction) -> str:
    if target := _TARGET.search(each.rest):
        epilogue = _EPILOGUE.search(each.rest)
        return target.group(1) + (f" {epilogue.group(1)}" if epilogue and epilogue.group(1) != "DEFAULT" else "")
    if backend := _BACKEND_KIND.search(each.rest):
        return backend.group(1)
    fusion = _FUSION_KIND.search(each.rest)
    return fusion.group(1).lower() if fusion else each.opcode


def _kind(each: Instruction, inside: list[Instruction]) -> str:
    detail = _detail(each)
    if detail.startswith(ATTENTION):
        return "attention"
    if detail.startswith(_GEMM) or "dot" in {each.opcode, *(one.opcode for one in inside)}:
        return "matrix product"
    if each.opcode == "custom-call":
        return "library"
    if _COLLECTIVE.match(each.opcode):
        return "collective"
    if not any(_computes(one) for one in inside or [each]):
        return "movement"
    if detail.startswith("__triton"):
        return "triton"
    return "reduction" if any(one.opcode in ("reduce", "reduce-window") for one in inside or [each]) else "loop"


def _computes(each: Instruction) -> bool:
    """Whether it makes new floating-point numbers; what indices need does not count."""
    return each.opcode not in _MOVES and each.opcode != "fusion" and each.type.lstrip("(").startswith(_FLOATS)


def _source(body: Mapping[str, Instruction], each: Instruction) -> str:
    """The kernel (or parameter) that an operand comes from, through bitcasts and tuples."""
    while each.opcode in ("bitcast", "get-tuple-element") and (names := each.operands) and names[0] in body:
        each = body[names[0]]
    return each.name


# ---- bytes


def _plain(operands: list[Instruction], each: Instruction) -> tuple[int, int, int]:
    """Read, written, and written in float32, of an instruction that is no fusion; a library's scratch is neither."""
    written = _SCRATCH.sub("", each.type) if each.opcode == "custom-call" else each.type
    return sum(array_bytes(one.type) for one in operands), array_bytes(written), _float32(written)


def _traffic(program: Program, name: str, operands: list[Instruction], each: Instruction) -> tuple[int, int, int]:
    """The same of a fusion. Slices read and updates in place write their part alone."""
    body = program.get(name, [])
    parameters = {int(one.rest.split(")")[0]): one for one in body if one.opcode == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for one in body:
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    read = sum(
        _part_read(parameters[i], users) if i in parameters else array_bytes(operand.type)
        for i, operand in enumerate(operands)
    )
    updates = [one for one in body if one.opcode == "dynamic-update-slice"]
    types = {one.name: one.type for one in body}
    spared = sum(array_bytes(one.type) - array_bytes(types[one.operands[1]]) for one in updates)
    spared32 = sum(_float32(one.type) - _float32(types[one.operands[1]]) for one in updates)
    return read, max(array_bytes(each.type) - spared, 0), max(_float32(each.type) - spared32, 0)


def _part_read(parameter: Instruction, users: Mapping[str, list[Instruction]]) -> int:
    """What is read of a fusion's parameter."""
    whole, part = array_bytes(parameter.type), 0
    waiting = [parameter]
    while waiting:
        source = waiting.pop()
        for user in users.get(source.name, []):
            if user.opcode == "bitcast":
                waiting.append(user)
            elif user.opcode in _SLICES:
                part += array_bytes(user.type)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
                return whole
    return min(part, whole)


def _float32(spelled: str) -> int:
    return sum(4 * math.prod(_lengths(lengths)) for kind, lengths in _ARRAY.findall(spelled) if kind == "f32")


# ---- FLOPs


@functools.lru_cache(maxsize=4096)
def _lengths(spelled: str) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", spelled))


def _product_flops(each: Instruction, types: Mapping[str, str]) -> float:
    """Of a matrix product, the compiler's own or cuBLAS's: two for every number of the result and term of its sum."""
    found = _CONTRACTED if each.opcode == "dot" else _LIBRARY_CONTRACTED if _detail(each).startswith(_GEMM) else None
    contracted = found and found.search(each.rest)
    if not contracted:
        return 0.0
    result = math.prod(_lengths(_ARRAY.findall(each.type)[0][1]))
    left = _lengths(_ARRAY.findall(types[each.operands[0]])[0][1])
    return 2.0 * result * math.prod(left[i] for i in _lengths(contracted.group(1)))


def _attention_flops(each: Instruction) -> float:
    """Of cuDNN's attention: two products of [B, N, T, S] scores and H numbers each, five in the backward."""
    found = _SCORES.search(each.rest) if _detail(each).startswith(ATTENTION) else None
    if found is None:
        return 0.0
    head_dim = _lengths(_ARRAY.findall(each.type)[0][1])[-1]
    forward = 4.0 * math.prod(_lengths(found.group(1))) * head_dim
    return forward * BACKWARD_PRODUCTS if _detail(each).endswith("Backward") else forward
