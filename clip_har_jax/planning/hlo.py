"""What a compiled program moves: memory traffic and collectives, read out of its optimised HLO.

XLA's own `cost_analysis` counts the body of a loop once; a training step is made of loops over layers and parts of the
batch, so here each body counts as often as it runs. An operand counts whole unless only slices of it are read; what
can't be told, such as how often a loop of unknown length runs, counts least.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_SLICES = {"dynamic-slice", "slice", "gather"}


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
        """Bytes of each array of the result that lies in main memory; 0 for one in on-chip memory."""
        return [0 if _is_on_chip(layout) else _array_bytes(kind, dims) for kind, dims, layout in _arrays_in(self.shape)]

    @property
    def size(self) -> int:
        """Bytes of the result, wherever it lies."""
        return sum(_array_bytes(kind, dims) for kind, dims, _ in _arrays_in(self.shape))


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind in a step."""

    count: int = 0
    bytes: int = 0  # that each device sends


@dataclass
class Traffic:
    """What one device moves in one run of a program."""

    memory_bytes: int = 0  # read from and written to main memory
    cycles: int = 0  # what a TPU's compiler expects its operations to take, one after the other; 0 from other compilers
    collectives: dict[str, Collective] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        return sum(each.bytes for each in self.collectives.values())


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


def read_traffic(text: str, num_devices: int) -> Traffic:
    """Memory traffic and collectives of one run of a compiled program, per device.

    Args:
      text: the optimised HLO, `compiled.as_text()`.
      num_devices: that the program runs on.
    """
    return _Reader(text, num_devices).traffic


class _Reader:
    def __init__(self, text: str, num_devices: int):
        self.num_devices, self.traffic = num_devices, Traffic()
        self.computations: dict[str, Computation] = {}
        current = entry = None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = Computation(header[2])
                entry = current if header[1] else entry
            elif current and (found := _INSTRUCTION.match(line)):
                root, name, shape, opcode, rest = found.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
                current.instructions[name] = Instruction(name, opcode, shape, operands, rest, bool(root))
        assert entry is not None, "every HLO module has an entry"
        self._add_computation(entry, 1)

    def _add_computation(self, computation: Computation, times: int) -> None:
        """Count what a computation does when it runs `times` times."""
        pieces: set[str] = set()  # of collectives that are spread over several fusions
        for each in computation.instructions.values():
            if each.opcode == "while":
                self._add_computation(self._called(each, "body"), times * self._trip_count(computation, each))
            elif each.opcode == "call":
                self._add_computation(self._called(each, "to_apply"), times)
            else:
                self.traffic.memory_bytes += times * self._bytes_accessed(computation, each)
                expected = re.search(r'"estimated_cycles":"(\d+)"', each.rest)
                self.traffic.cycles += times * int(expected[1]) if expected else 0
                for owner, collective in self._collectives(computation, each):
                    channel = collective.attribute("channel_id") or ""
                    if owner is not computation and channel in pieces:
                        continue
                    pieces |= {channel} if owner is not computation else set()
                    self._add_collective(owner, collective, times)

    def _called(self, instruction: Instruction, attribute: str) -> Computation:
        return self.computations[instruction.attribute(attribute) or ""]

    # --- loops -------------------------------------------------------------------------------------------------------

    def _trip_count(self, computation: Computation, loop: Instruction) -> int:
        """How often a loop's body runs: as XLA noted, or else read from its counter; 1 where neither tells."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(noted[1])
        condition, body = self._called(loop, "condition"), self._called(loop, "body")
        test = condition.root
        counter = condition.instructions.get(test.operands[0]) if test.operands else None
        if test.attribute("direction") != "LT" or counter is None or counter.attribute("index") is None:
            return 1
        index = int(counter.attribute("index") or 0)
        step = body.instructions.get(body.root.operands[index])
        steps = [_constant(body, name) for name in step.operands] if step and step.opcode == "add" else []
        by = next((value for value in steps if value is not None), None)
        limit = _constant(condition, test.operands[1])
        start = _constant(computation, computation.instructions[loop.operands[0]].operands[index])
        return 1 if None in (by, limit, start) else max(0, -(-(limit - start) // by))  # type: ignore[operator]

    # --- memory ------------------------------------------------------------------------------------------------------

    def _bytes_accessed(self, computation: Computation, each: Instruction) -> int:
        """Bytes that an instruction reads from and writes to main memory."""
        if each.opcode in _NO_TRAFFIC or each.opcode.endswith("-done") or not each.operands:
            return 0
        if each.opcode == "fusion":
            return self._fusion_bytes(computation, each)
        operands = [computation.instructions[name] for name in each.operands]
        if each.opcode.endswith("-start"):  # source and destination; of a slice only as much as is taken
            taken = min(size for _, size in zip(range(2), _sizes(each), strict=False))
            return sum(min(taken, size) for size in each.arrays[:2])
        if each.opcode in _SLICES:
            return 2 * sum(each.arrays)
        if each.opcode == "dynamic-update-slice":
            return 2 * sum(operands[1].arrays)
        return sum(each.arrays) + sum(sum(operand.arrays) for operand in operands)

    def _fusion_bytes(self, computation: Computation, fusion: Instruction) -> int:
        fused = self._called(fusion, "calls")
        total = 0
        for parameter, name in zip(fused.parameters, fusion.operands, strict=True):
            size = sum(computation.instructions[name].arrays)
            total += min(size, self._bytes_read(fused, parameter.name, size)) if size else 0
        root = fused.root
        written = root.operands if root.opcode == "tuple" else (root.name,)
        if len(written) != len(fusion.arrays):  # a tuple made elsewhere
            return total + sum(fusion.arrays)
        return total + sum(
            min(size, self._bytes_written(fused, name)) for size, name in zip(fusion.arrays, written, strict=True)
        )

    def _bytes_read(self, fused: Computation, name: str, size: int) -> int:
        """Bytes read of an input of a fusion: a slice of it, where all that use it take slices."""
        total = 0
        for user in fused.users[name]:
            if user.opcode == "bitcast":
                total += self._bytes_read(fused, user.name, size)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += user.size
            elif user.opcode == "fusion":
                inner = self._called(user, "calls")
                total += self._bytes_read(inner, inner.parameters[user.operands.index(name)].name, size)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):  # that is done in place
                return size
        return total

    def _bytes_written(self, fused: Computation, name: str) -> int:
        """Bytes written of an output of a fusion: of an array updated in place only the update."""
        each = fused.instructions[name]
        if each.opcode == "bitcast":
            return self._bytes_written(fused, each.operands[0])
        if each.opcode == "fusion":
            inner = self._called(each, "calls")
            return self._bytes_written(inner, inner.root.name)
        return fused.instructions[each.operands[1]].size if each.opcode == "dynamic-update-slice" else each.size

    # --- collectives -------------------------------------------------------------------------------------------------

    def _collectives(self, computation: Computation, each: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Return the collectives of an instruction, with the computation in which each stands: itself, or in its
        fusion.
        """
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            yield computation, each
        elif each.opcode == "fusion":
            fused = self._called(each, "calls")
            for inner in fused.instructions.values():
                yield from self._collectives(fused, inner)

    def _add_collective(self, owner: Computation, each: Instruction, times: int) -> None:
        kind = each.opcode.removesuffix("-start")
        size = sum(owner.instructions[name].size for name in each.operands)
        others = _group_size(each.rest, self.num_devices) - 1
        sent = {
            "all-gather": size * others,
            "all-reduce": 2 * size * others // (others + 1),  # a reduce-scatter and an all-gather
            "collective-permute": size,
        }.get(kind, size * others // (others + 1))
        old = self.traffic.collectives.get(kind, Collective())
        self.traffic.collectives[kind] = Collective(old.count + times, old.bytes + times * sent)


def _sizes(each: Instruction) -> list[int]:
    return [_array_bytes(kind, dims) for kind, dims, _ in _arrays_in(each.shape)]


def _constant(computation: Computation, name: str) -> int | None:
    each = computation.instructions.get(name)
    if each is not None and each.opcode in ("bitcast", "copy"):
        return _constant(computation, each.operands[0])
    value = re.match(r"(-?\d+)\)", each.rest) if each is not None and each.opcode == "constant" else None
    return value and int(value[1])


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices that a collective joins, from any of the three ways in which HLO writes its `replica_groups`."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        size = 1
        for axis in re.findall(r"'([^']+)'", mesh[2]):
            size *= int(sizes[axis])
        return size
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    return num_devices  # none named: all
