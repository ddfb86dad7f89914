"""The bytes that a compiled program moves and sends, and the operations that its memory limits.

XLA's own `cost_analysis` counts the body of a loop once. A training step consists of loops over layers and over parts
of the batch, so here a body counts as often as it runs. An operand counts as a whole unless only slices of it are read.
Where the text leaves something open, such as the length of a loop, the smallest value counts. The decision and its
reasons: docs/adr/0007-own-hlo-accounting.md.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from clip_har_jax.planning.hlo import Computation, Instruction, constant_of, dims_of, parse_hlo, sizes_of

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a run of the program."""

    count: int = 0
    bytes: int = 0  # sent by each device


@dataclass(frozen=True)
class Operation:
    """One instruction of the program over all its runs; of a fusion the fused operations together."""

    name: str
    source: str  # name of the JAX operation that it was compiled from
    times: int  # runs
    memory_bytes: int  # over all runs
    flops: int  # of matrix products, over all runs


@dataclass
class Traffic:
    """The bytes that one device moves in one run of a program."""

    memory_bytes: int = 0  # read from and written to main memory
    cycles: int = 0  # sum of the compiler's estimates for the instructions; 0 where the compiler gives none (not a TPU)
    collectives: dict[str, Collective] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    @property
    def sent_bytes(self) -> int:
        return sum(each.bytes for each in self.collectives.values())

    def memory_bound(self, flops_per_byte: float) -> list[Operation]:
        """Return the operations that memory limits, those that move the most bytes first.

        Args:
          flops_per_byte: the chip's peak FLOP/s over its memory bandwidth, the ridge of the roofline.
        """
        limited = [each for each in self.operations if each.flops < flops_per_byte * each.memory_bytes]
        return sorted(limited, key=lambda each: -each.memory_bytes)


def read_traffic(text: str, num_devices: int) -> Traffic:
    """Return the memory traffic and the collectives of one run of a compiled program, for each device.

    Args:
      text: the optimised HLO, `compiled.as_text()`.
      num_devices: of the program.
    """
    return _Reader(text, num_devices).traffic


class _Reader:
    def __init__(self, text: str, num_devices: int):
        self.num_devices, self.traffic = num_devices, Traffic()
        self.computations, entry = parse_hlo(text)
        self._add_computation(entry, 1)

    def _add_computation(self, computation: Computation, times: int) -> None:
        """Add the traffic of `times` runs of a computation."""
        pieces: set[str] = set()  # channels of collectives that are split over several fusions: each counts once
        for each in computation.instructions.values():
            if each.opcode == "while":
                self._add_computation(self._called(each, "body"), times * self._trip_count(computation, each))
            elif each.opcode == "call":
                self._add_computation(self._called(each, "to_apply"), times)
            else:
                self._add_operation(computation, each, times)
                expected = re.search(r'"estimated_cycles":"(\d+)"', each.rest)
                self.traffic.cycles += times * int(expected[1]) if expected else 0
                for owner, collective in self._collectives(computation, each):
                    channel = collective.attribute("channel_id") or ""
                    if owner is not computation and channel in pieces:
                        continue
                    pieces |= {channel} if owner is not computation else set()
                    self._add_collective(owner, collective, times)

    def _add_operation(self, computation: Computation, each: Instruction, times: int) -> None:
        moved = times * self._bytes_accessed(computation, each)
        self.traffic.memory_bytes += moved
        if moved:
            source = re.search(r'op_name="([^"]*)"', each.rest)
            flops = times * self._flops(computation, each)
            self.traffic.operations.append(Operation(each.name, source[1] if source else "", times, moved, flops))

    def _flops(self, computation: Computation, each: Instruction) -> int:
        """Return the FLOPs of the matrix products in an instruction; TPUs write them as convolutions."""
        if each.opcode == "fusion":
            fused = self._called(each, "calls")
            return sum(self._flops(fused, inner) for inner in fused.instructions.values())
        if each.opcode not in ("dot", "convolution"):
            return 0
        left, right = (dims_of(computation.instructions[name].shape) for name in each.operands)
        if each.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
            depth = math.prod(left[int(dim)] for dim in contracted[1].split(",") if dim) if contracted else 1
        else:
            kernel = re.search(r"dim_labels=\w+_(\w+)->", each.rest)
            depth = math.prod(right) // (right[kernel[1].index("o")] if kernel else 1)
        return 2 * depth * math.prod(dims_of(each.shape))

    def _called(self, instruction: Instruction, attribute: str) -> Computation:
        return self.computations[instruction.attribute(attribute) or ""]

    # --- loops -------------------------------------------------------------------------------------------------------

    def _trip_count(self, computation: Computation, loop: Instruction) -> int:
        """Return how often the body of a loop runs: from XLA's note, or else from its counter; 1 if unknown."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(noted[1])
        condition, body = self._called(loop, "condition"), self._called(loop, "body")
        test = condition.root
        counter = condition.instructions.get(test.operands[0]) if test.operands else None
        if test.attribute("direction") != "LT" or counter is None or counter.attribute("index") is None:
            return 1
        index = int(counter.attribute("index") or 0)
        step = body.instructions.get(body.root.operands[index])
        steps = [constant_of(body, name) for name in step.operands] if step and step.opcode == "add" else []
        by = next((value for value in steps if value is not None), None)
        limit = constant_of(condition, test.operands[1])
        start = constant_of(computation, computation.instructions[loop.operands[0]].operands[index])
        return 1 if None in (by, limit, start) else max(0, -(-(limit - start) // by))  # type: ignore[operator]

    # --- memory ------------------------------------------------------------------------------------------------------

    def _bytes_accessed(self, computation: Computation, each: Instruction) -> int:
        """Return the bytes that an instruction reads from and writes to main memory."""
        if each.opcode in _NO_TRAFFIC or each.opcode.endswith("-done") or not each.operands:
            return 0
        if each.opcode == "fusion":
            return self._fusion_bytes(computation, each)
        operands = [computation.instructions[name] for name in each.operands]
        if each.opcode.endswith("-start"):  # source and destination; of a slice only its own bytes
            taken = min(size for _, size in zip(range(2), sizes_of(each), strict=False))
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
        if len(written) != len(fusion.arrays):  # the root passes on a tuple, whose elements aren't named here
            return total + sum(fusion.arrays)
        return total + sum(
            min(size, self._bytes_written(fused, name)) for size, name in zip(fusion.arrays, written, strict=True)
        )

    def _bytes_read(self, fused: Computation, name: str, size: int) -> int:
        """Return the bytes read of an input of a fusion: only slices, if all its users take slices."""
        total = 0
        for user in fused.users[name]:
            if user.opcode == "bitcast":
                total += self._bytes_read(fused, user.name, size)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += user.size
            elif user.opcode == "fusion":
                inner = self._called(user, "calls")
                total += self._bytes_read(inner, inner.parameters[user.operands.index(name)].name, size)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):  # updated in place
                return size
        return total

    def _bytes_written(self, fused: Computation, name: str) -> int:
        """Return the bytes written of an output of a fusion: of an array updated in place only the update."""
        each = fused.instructions[name]
        if each.opcode == "bitcast":
            return self._bytes_written(fused, each.operands[0])
        if each.opcode == "fusion":
            inner = self._called(each, "calls")
            return self._bytes_written(inner, inner.root.name)
        return fused.instructions[each.operands[1]].size if each.opcode == "dynamic-update-slice" else each.size

    # --- collectives -------------------------------------------------------------------------------------------------

    def _collectives(self, computation: Computation, each: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Yield the collectives of an instruction, each with the computation that contains it."""
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


def _group_size(attributes: str, num_devices: int) -> int:
    """Return the number of devices in a group of a collective; HLO writes `replica_groups` in three ways."""
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
    return num_devices  # no groups: all devices
