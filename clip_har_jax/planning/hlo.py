"""The optimised HLO of a compiled program as data: computations of instructions, parsed from its text."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    shape: str  # with layout, as in bf16[8,128]{1,0:T(8,128)}; a tuple's in parentheses
    operands: tuple[str, ...]
    rest: str  # operands and attributes as they stand
    is_root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]

    @property
    def arrays(self) -> list[int]:
        """Bytes of each array of the result; 0 for one in on-chip memory."""
        return [0 if _is_on_chip(layout) else _array_bytes(kind, dims) for kind, dims, layout in _arrays_in(self.shape)]

    @property
    def size(self) -> int:
        """Bytes of the result, in either memory."""
        return sum(_array_bytes(kind, dims) for kind, dims, _ in _arrays_in(self.shape))


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(each for each in reversed(self.instructions.values()) if each.is_root)

    @cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                users[operand].append(each)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.rest.split(")")[0]))


def _arrays_in(shape: str) -> list[tuple[str, str, str]]:
    return [part for part in _ARRAY.findall(shape) if part[0] in _BITS]


def _array_bytes(kind: str, dims: str) -> int:
    size = _BITS[kind]
    for dim in filter(None, dims.split(",")):
        size *= int(dim)
    return size // 8


def _is_on_chip(layout: str) -> bool:
    return re.search(r"S\([1-9]", layout) is not None  # a memory space: 1 is a TPU's vector memory


def sizes_of(each: Instruction) -> list[int]:
    return [_array_bytes(kind, dims) for kind, dims, _ in _arrays_in(each.shape)]


def constant_of(computation: Computation, name: str) -> int | None:
    each = computation.instructions.get(name)
    if each is not None and each.opcode in ("bitcast", "copy"):
        return constant_of(computation, each.operands[0])
    value = re.match(r"(-?\d+)\)", each.rest) if each is not None and each.opcode == "constant" else None
    return value and int(value[1])


def dims_of(shape: str) -> list[int]:
    """Return the dimensions of an array's shape."""
    found = _ARRAY.search(shape)
    return [int(dim) for dim in found[2].split(",") if dim] if found else []


def parse_hlo(text: str) -> tuple[dict[str, Computation], Computation]:
    """Return the computations of an HLO module by name, and its entry.

    Args:
      text: the optimised HLO, `compiled.as_text()`.
    """
    computations: dict[str, Computation] = {}
    current = entry = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = current if header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
            current.instructions[name] = Instruction(name, opcode, shape, operands, rest, bool(root))
    assert entry is not None, "every HLO module has an entry"
    return computations, entry
