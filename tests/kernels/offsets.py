"""32-bit products in a compiled kernel's pointer offsets, found in its TTIR (Triton's own intermediate code).

An offset wraps where a 32-bit number that grows with the tensors is multiplied by another: the number of a program, a
loop's counter, a length, times a stride or a size. Products with a block's size only count elements of one dimension,
and those of two sizes of a layer (states by channels) stay small.
"""

import re
from collections.abc import Iterator, Sequence

LARGEST_BLOCK = 1024
GROWING_ARGUMENTS = {"length", "rows", "out_rows", "segments", "chunks"}
_VALUE = re.compile(r"%[\w.]+(?:#\d+)?")
_DEFINITION = re.compile(r"^(%[\w.]+)(?::(\d+))? = (\S+) ?(.*)$")
_LOOP = re.compile(r"(%[\w.]+) = (%\S+) to (%\S+) step")
_CARRIED = re.compile(r"(%[\w.]+) = (%[\w.#]+)")
_CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? : \S*i(?:32|64)")


class _Code:
    """Values by name. MLIR gives a name again only after its region has ended, so that lines are read in order."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[str, ...]] = {}
        self.constants: dict[str, int] = {}
        self.growing: set[str] = set()
        self.products: set[str] = set()  # those that may wrap

    def grows(self, name: str) -> bool:
        return any(value in self.growing for value in self._behind(name))

    def wraps(self, name: str) -> bool:
        return any(value in self.products for value in self._behind(name))

    def constant(self, name: str) -> int | None:
        """What a number, or a tensor filled with one, is known to be."""
        found = {self.constants.get(value) for value in self._behind(name) if not self.sources.get(value)}
        return found.pop() if len(found) == 1 else None

    def define(self, name: str, operation: str, rest: str) -> None:
        operands = tuple(_VALUE.findall(rest.split(" : ")[0]))
        # what is read from memory is a number of its own
        self.sources[name] = () if operation in ("tt.load", "arith.constant") else operands
        self.constants.pop(name, None)
        self.growing.discard(name)
        self.products.discard(name)
        if operation == "arith.constant" and (number := _CONSTANT.match(rest)):
            self.constants[name] = int(number[1])
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            self.growing.add(name)
        if operation == "arith.muli" and re.search(r"i32>?$", rest):
            sizes = [self.constant(x) for x in operands]
            small = any(size is not None and abs(size) <= LARGEST_BLOCK for size in sizes)
            if not small and any(self.grows(x) for x in operands):
                self.products.add(name)

    def _behind(self, name: str) -> Iterator[str]:
        """The value and everything it is computed from."""
        seen, waiting = set(), [name]
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            yield value
            waiting += self.sources.get(value, self.sources.get(value.split("#")[0], ()))


def narrow_offsets(ttir: str) -> list[str]:
    """The lines whose pointer offset comes from a 32-bit product that may wrap."""
    code, faults = _Code(), []
    for line in (re.sub(r" loc\(.*\)$", "", line.strip()) for line in ttir.splitlines()):
        if line.startswith("tt.func"):
            arguments = [name[1:] for name in _VALUE.findall(line)]
            code.growing |= {f"%{name}" for name in arguments if name in GROWING_ARGUMENTS}
        if loop := _LOOP.search(line):
            _enter(code, line, loop.groups())
        found = _DEFINITION.match(line)
        if found is None or found[3].startswith("scf."):
            continue
        code.define(found[1], found[3], found[4])
        if found[3] == "tt.addptr":
            pointer, offset = code.sources[found[1]]
            code.sources[found[1]] = (pointer,)
            if code.wraps(offset):
                faults.append(line)
    return faults


def _enter(code: _Code, line: str, loop: Sequence[str]) -> None:
    """A loop's counter grows unless its end is known; what is carried along is taken as it is at the beginning."""
    counter, _, end = loop
    code.sources[counter] = ()
    code.constants.pop(counter, None)
    code.growing.discard(counter)
    if code.constant(end) is None:
        code.growing.add(counter)
    if "iter_args(" in line:
        carried = _CARRIED.findall(line.split("iter_args(")[1].split(") ->")[0])
        for name, initial in carried:
            code.sources[name] = (initial, "%later")  # which is no constant
        if result := re.match(r"^(%[\w.]+)(?::\d+)? = scf", line):
            code.sources[result[1]] = tuple(initial for _, initial in carried)
