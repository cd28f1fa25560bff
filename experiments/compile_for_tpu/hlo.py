"""What a program compiled for a TPU does, read from its text: loops with their trips, collectives, buffers, cycles.

The compiler's own sums count a loop's body once and a kernel as nothing. Here every instruction counts as often as the
loops around it turn.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8}  # bytes; others end in their bits
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
NO_WORK = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant", "copy-done")
SENTINEL = 1 << 60  # cycles that the compiler does not know

ARRAY = re.compile(r"(pred|[a-z]+\d+(?:e\d+m\d+(?:fn)?)?)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s*(ROOT )?%([^ ]+) = (\(.*?\)|[^ ]+) ([a-z][a-z\-\d]*)\(")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^,\s}]+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # else in the chip's fast memory

    @property
    def bytes(self) -> int:
        width = SIZES.get(self.dtype) or int(re.findall(r"\d+", self.dtype)[0]) / 8
        return int(width * math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    kind: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    cycles: int
    text: str

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    @property
    def bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.outputs)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Chips exchanging something, `count` times."""

    kind: str
    count: int
    bytes: int  # bytes of the whole array, exchanged once
    in_loop: bool
    group: int  # chips that take part together
    op_name: str

    @property
    def received(self) -> float:
        """Bytes that reach each chip, all times together, by ring algorithms."""
        share = (self.group - 1) / self.group if self.group else 1.0
        turns = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.count * self.bytes * turns


def buffers(text: str) -> tuple[Buffer, ...]:
    """The arrays of an instruction's type."""
    return tuple(
        Buffer(dtype, tuple(int(n) for n in shape.split(",") if n), "S(1)" not in (layout or ""))
        for dtype, shape, layout in ARRAY.findall(text)
    )


class Module:
    """A compiled program. `unknown` says how often a loop turns whose trips the program decides as it runs."""

    def __init__(self, text: str, unknown: Callable[[Instruction], int] = lambda loop: 1):
        self._unknown = unknown
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
            if line == "}":
                current = {}
            elif line.endswith("{") and (match := re.match(r"(ENTRY )?%([^ ]+) \(", line)):
                current = self.computations.setdefault(match[2], {})
                if match[1]:
                    self.entry = match[2]
            elif match := INSTRUCTION.match(line):
                current[match[2]] = _instruction(match, line)

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop turns, from the constant that its condition compares with; None: not known."""
        condition = self.computations[_called_name(loop, "condition")]
        compared = [i for i in condition.values() if i.kind == "compare"]
        constants = [
            int(match[1])
            for i in compared
            for name in i.operands
            if (match := re.search(r" constant\((\d+)\)", condition[name].text if name in condition else ""))
        ]
        return constants[0] if len(constants) == 1 else None

    @functools.cached_property
    def executed(self) -> list[tuple[Instruction, int, bool]]:
        """Every instruction outside fusions, how often it runs, and whether a loop is around it."""
        runs: list[tuple[Instruction, int, bool]] = []

        def visit(name: str, times: int, in_loop: bool) -> None:
            for i in self.computations[name].values():
                runs.append((i, times, in_loop))
                if i.kind == "while":
                    turns = self.trips(i)
                    visit(_called_name(i, "body"), times * (self._unknown(i) if turns is None else turns), True)
                elif i.kind == "conditional":
                    visit(max(i.called, key=lambda c: self._weight(c)), times, in_loop)
                elif i.kind == "call":
                    for called in i.called:
                        visit(called, times, in_loop)

        visit(self.entry, 1, False)
        return runs

    def _weight(self, computation: str) -> int:
        """Bytes that a branch touches, to tell which is the largest."""
        return sum(i.bytes + self._weight_of_called(i) for i in self.computations[computation].values())

    def _weight_of_called(self, i: Instruction) -> int:
        return 0 if i.kind not in ("call", "while", "conditional") else sum(self._weight(c) for c in i.called)

    def collectives(self) -> list[Collective]:
        """Every exchange between chips, in the order of the program."""
        return list(self._collectives())

    def _collectives(self) -> Iterator[Collective]:
        for i, times, in_loop in self.executed:
            kind = i.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                size = max((buffer.bytes for buffer in i.outputs), default=0)
                if kind == "reduce-scatter":
                    size *= max(_group(i.text), 1)
                yield Collective(kind, times, size, in_loop, _group(i.text), i.op_name)
            elif i.kind in ("fusion", "async-start"):
                inside = [j for c in i.called for j in self._deep(c) if j.kind.removesuffix("-start") in COLLECTIVES]
                for j in inside:
                    scattered = any("all-reduce-scatter" in c for c in i.called)
                    kind = "reduce-scatter" if scattered else j.kind.removesuffix("-start")
                    size = max(buffer.bytes for buffer in j.outputs)
                    yield Collective(kind, times, size, in_loop, _group(j.text), i.op_name or j.op_name)

    def _deep(self, computation: str) -> Iterator[Instruction]:
        for i in self.computations.get(computation, {}).values():
            yield i
            for called in i.called:
                yield from self._deep(called)

    def cycles(
        self, kernel: Callable[[Instruction, "Module"], float], bytes_per_cycle: float, flops_per_cycle: float
    ) -> float:
        """The compiler's estimates, summed over trips; `kernel` gives those of custom calls, which have none.

        That of a fusion which takes a slice of an array is for the whole array, and is corrected by the chip's speeds.
        A fusion without an estimate (a gather, a scatter) takes the time of its bytes.
        """
        total = 0.0
        for i, times, _ in self.executed:
            if i.kind == "custom-call":
                total += times * kernel(i, self)
            elif i.cycles < SENTINEL or i.kind == "fusion":
                total += times * self._corrected(i, bytes_per_cycle, flops_per_cycle)
        return total

    def largest(self) -> tuple[int, str]:
        """The largest array that an instruction makes, in bytes, and where it comes from."""
        arrays = [(b.bytes, i) for i, _, _ in self.executed if i.kind not in NO_WORK for b in i.outputs if b.in_hbm]
        size, i = max(arrays, key=lambda sized: sized[0])
        return size, f"{i.outputs[0].dtype}{list(i.outputs[0].shape)} {i.op_name or i.name}"

    def traffic(self, kernel: Callable[[Instruction], int | None] = lambda i: None) -> int:
        """Bytes that move between the chip's memory and its compute units: operands read, results written.

        A fusion that reads or writes a slice of an array counts the slice. `kernel` gives the bytes of a custom call
        that reads parts of its operands; None: it reads them whole.
        """

        def moved(i: Instruction) -> int:
            of_kernel = kernel(i) if i.kind == "custom-call" else None
            return self.moved(i) if of_kernel is None else of_kernel

        return sum(times * moved(i) for i, times, _ in self.executed if i.kind not in NO_WORK)

    def moved(self, i: Instruction) -> int:
        """Bytes that an instruction reads and writes, once."""
        if i.kind == "copy-start":  # between the chip's two memories, ahead of time
            copied = i.outputs[:2]
            return sum(b.bytes for b in copied if b.in_hbm)
        if i.kind in COLLECTIVES or i.kind.endswith(("-start", "-done")):
            return 0
        return self._read(i) + self._written(i)

    def _read(self, i: Instruction, whole: bool = False) -> int:
        """Bytes of the operands, or of the slices taken of them, unless `whole`."""
        owner, total = self._owner[id(i)], 0
        for number, name in enumerate(i.operands):
            producer = owner.get(name)
            if producer is None or not producer.outputs or producer.kind == "constant":
                continue
            size = sum(b.bytes for b in producer.outputs if b.in_hbm)
            sliced = None if whole or i.kind != "fusion" else self._sliced(i.called[0], number)
            if i.kind in ("dynamic-slice", "gather") and number == 0 and not whole:
                sliced = i.bytes
            elif i.kind in ("dynamic-update-slice", "scatter") and number == 0 and not whole:
                sliced = 0
            total += size if sliced is None else min(size, sliced)
        return total

    def _sliced(self, computation: str, number: int) -> int | None:
        """Bytes that a fusion takes of its operand, if all that it does is slice or update it."""
        inside = self.computations[computation]
        numbered = ((re.search(r" parameter\((\d+)\)", j.text), j) for j in inside.values() if j.kind == "parameter")
        parameter = next((j for match, j in numbered if match and int(match[1]) == number), None)
        return None if parameter is None else self._sliced_by_users(inside, parameter)

    def _sliced_by_users(self, inside: dict[str, Instruction], producer: Instruction) -> int | None:
        total = 0
        for user in inside.values():
            for at, name in enumerate(user.operands):
                if name != producer.name:
                    continue
                if user.kind in ("dynamic-slice", "gather", "slice") and at == 0:
                    sliced: int | None = user.bytes
                elif user.kind in ("dynamic-update-slice", "scatter") and at == 0:
                    sliced = 0
                elif user.kind in ("bitcast", "reshape"):
                    sliced = self._sliced_by_users(inside, user)
                elif user.kind == "fusion":
                    sliced = self._sliced(user.called[0], at)
                else:
                    sliced = None
                if sliced is None:
                    return None
                total += sliced
        return total

    def _written(self, i: Instruction) -> int:
        """Bytes of the results; of an array that is updated in place, of the update."""
        inside = self.computations.get(i.called[0], {}) if i.kind == "fusion" and i.called else {}
        updates = [j for j in inside.values() if j.kind in ("dynamic-update-slice", "scatter")]
        if i.kind in ("dynamic-update-slice", "scatter"):
            updates, inside = [i], self._owner[id(i)]
        size = sum(b.bytes for b in i.outputs if b.in_hbm)
        if updates and sum(j.bytes for j in updates) >= size > 0:
            update_names = [j.operands[-1 if j.kind == "scatter" else 1] for j in updates]
            return sum(inside[name].bytes for name in update_names if name in inside)
        return size

    def _corrected(self, i: Instruction, bytes_per_cycle: float, flops_per_cycle: float) -> float:
        """The compiler's estimate of a fusion, which counts a sliced operand whole: cut to the share of the bytes that
        move, but not below what its products take."""
        if i.kind != "fusion":
            return i.cycles
        if not 0 < i.cycles < SENTINEL:
            return self.moved(i) / bytes_per_cycle
        read, written = self._read(i, whole=True), self._written(i)
        share = (self._read(i) + written) / (read + written) if read + written else 1.0
        products = sum(self._product_flops(c) for c in i.called) / flops_per_cycle
        return min(i.cycles, max(i.cycles * share, products))

    def _product_flops(self, computation: str) -> float:
        """2 M N K of the products inside, from the sizes MK, KN and MN; of B products at once, sqrt(B) too many."""
        inside, total = self.computations.get(computation, {}), 0.0
        for i in inside.values():
            if i.kind in ("convolution", "dot"):
                factors = [inside[name].outputs[0] for name in i.operands[:2] if name in inside]
                total += 2 * math.sqrt(math.prod(math.prod(b.shape) for b in (*factors, i.outputs[0])))
            total += sum(self._product_flops(c) for c in i.called)
        return total

    @functools.cached_property
    def _owner(self) -> dict[int, dict[str, Instruction]]:
        return {id(i): computation for computation in self.computations.values() for i in computation.values()}


def _called_name(i: Instruction, role: str) -> str:
    match = re.search(rf"{role}=%([^,\s]+)", i.text)
    assert match, i.text
    return match[1]


def _instruction(match: re.Match, line: str) -> Instruction:
    name, kind = match[2], match[4]
    if kind == "constant":
        line = line[: match.end() + 100]  # a large constant is printed with all its numbers
    inside = line[match.end() :]
    depth = itertools.accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in inside)
    end = next((at for at, level in enumerate(depth) if level < 0), 0)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
    called = CALLED.findall(line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        called += [c.strip().removeprefix("%") for c in branches[1].split(",")]
    operands = tuple(re.findall(r"%([^,\s)]+)", inside[:end]))
    return Instruction(name, kind, buffers(match[3]), operands, tuple(called), int(cycles[1]) if cycles else 0, line)


def _group(text: str) -> int:
    """How many chips exchange among themselves."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([^}]*)\}", text):
        return len(match[1].split(","))
    return 0
