"""A pickle interpreter that executes nothing: it builds plain containers; what a pickle calls or instantiates becomes an inert `Opaque`.

    value, end = Machine(data, persistent=..., calls=...).run()

Python's own unpicklers do not serve here, restricted or not. A subclass of `pickle.Unpickler` with a closed `find_class` still sizes its
memo by a number in the file (gigabytes from ten bytes), and hashes nested tuples and colliding integers without a bound on time.
`torch.load(weights_only=True)` refuses what real checkpoints hold (`argparse.Namespace`, loss scalers) unless those very classes are let
in. This interpreter supports the opcodes that checkpoints use, one line each, and its values have no behaviour.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 16 * 2**20
MAX_OPCODES = 500_000
"""Limits that are more than ten times what a checkpoint of the 200B model with its optimizer needs; together they bound time and memory."""

MAX_NAME = 512
"""Largest length of a class or function name with its module. Each use of a name makes a copy."""


class PickleError(ValueError):
    """The pickle is damaged, hostile, or not of the kind that checkpoints hold. The message is a fragment for the caller's error line."""


@dataclass(frozen=True)
class Global:
    """A function or class named in a pickle. It is never imported."""

    name: str
    """Module and name, joined by a dot."""


@dataclass(eq=False, repr=False)
class Opaque:
    """An object that a pickle would have created by a call: only the call's function and arguments are kept."""

    name: str
    args: Any = None
    state: Any = None
    """The state that would have been passed to `__setstate__` or `__dict__`."""


class Machine:
    """Reads one pickle.

    Values are None, bool, int, float, str, bytes, tuple, list, dict, `Global`, `Opaque`, and what `persistent` and `calls` return. Nesting
    is not limited: never walk a value recursively, compare it or print it.

    Args:
        data: bytes that contain the pickle.
        start: offset of the pickle.
        persistent: returns the value for a persistent id.
        calls: by full name, replacements for functions that the pickle calls; each is given the tuple of arguments.
    """

    def __init__(
        self, data: bytes, start: int = 0, *, persistent: Callable[[Any], Any], calls: Mapping[str, Callable[[tuple[Any, ...]], Any]]
    ) -> None:
        self.data, self.position = data, start
        self._end = min(len(data), start + MAX_BYTES)
        self._persistent, self._calls = persistent, calls
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        """The value, and the offset at which the pickle ends.

        Raises:
            PickleError: if the pickle is not acceptable. Time and memory are bounded for any content.
        """
        try:
            for _ in range(MAX_OPCODES):
                opcode = self._take(1)[0]
                if opcode == _STOP:
                    return self._stack.pop(), self.position
                operation = _OPERATIONS.get(opcode)
                if operation is None:
                    raise PickleError(f"opcode {opcode:#04x} at byte {self.position - 1}, which no checkpoint needs")
                operation(self)
        except IndexError:
            raise PickleError(f"its values run out at byte {self.position}") from None
        raise PickleError(f"more than {MAX_OPCODES:,} opcodes")

    # --- bytes ---------------------------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        begin = self.position
        if count > self._end - begin:
            raise PickleError(f"cut off: {count:,} bytes expected at byte {begin}, {self._end - begin:,} are left")
        self.position = begin + count
        return self.data[begin : self.position]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, size: int) -> str:
        try:
            return self._take(size).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise PickleError(f"no valid text before byte {self.position}") from None

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, min(self._end, self.position + 256))
        if end < 0:
            raise PickleError(f"no name at byte {self.position}")
        text = self._text(end - self.position)
        self.position += 1
        return text

    def _long(self, size: int) -> int:
        if not 0 <= size <= 256:
            raise PickleError(f"an integer of {size:,} bytes")
        return int.from_bytes(self._take(size), "little", signed=True)

    # --- the stack -----------------------------------------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _items(self) -> list[Any]:
        """Pop the values that were pushed since the last mark."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _pop_many(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        return items

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise PickleError(f"memo {index} was never set")
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # --- containers and objects ----------------------------------------------------------------------------------------------------------

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise PickleError(f"appends to a {type(target).__name__}")

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2 or not isinstance(target, (dict, Opaque)):
            raise PickleError(f"sets {len(items)} items of a {type(target).__name__}")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_hashable(key)] = value

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
            raise PickleError("names a class by something that is not a name")
        self._push(Global(f"{module}.{name}"))

    def _call(self, function: Any, args: Any) -> None:
        if not isinstance(function, (Global, Opaque)) or type(args) is not tuple:
            raise PickleError(f"calls a {type(function).__name__} with a {type(args).__name__}")
        known = self._calls.get(function.name) if isinstance(function, Global) else None
        self._push(known(args) if known else Opaque(function.name, args))

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state  # attributes of anything else (a dict's `_metadata`) say nothing about weights

    def _protocol(self) -> None:
        protocol = self._take(1)[0]
        if protocol > 5:
            raise PickleError(f"pickle protocol {protocol}")


def _hashable(key: Any) -> Any:
    """The key itself if it is cheap to hash, else a substitute that is hashed by identity, under which the value cannot be looked up."""
    cheap = type(key) in (str, bytes, bool, type(None)) or (type(key) is int and -(2**60) < key < 2**60)
    return key if cheap else Opaque("key", key)


def _two(operation: Callable[[Machine, Any, Any], None]) -> Callable[[Machine], None]:
    return lambda machine: operation(machine, *machine._pop_many(2))


def _new_object(machine: Machine) -> None:
    cls, args, _ = machine._pop_many(3)
    machine._call(cls, args)


_STOP = ord(".")
# The text opcodes of protocol 0, INST, OBJ, extensions, DUP and out-of-band buffers are not there.
_OPERATIONS: dict[int, Callable[[Machine], Any]] = {
    0x80: Machine._protocol,
    0x95: lambda m: m._take(8),  # FRAME: a hint to readers of streams
    ord("("): Machine._mark,
    ord("0"): lambda m: m._stack.pop(),
    ord("1"): Machine._items,  # POP_MARK
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(m._number("<i")),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    0x8A: lambda m: m._push(m._long(m._number("<B"))),
    0x8B: lambda m: m._push(m._long(m._number("<i"))),
    ord("G"): lambda m: m._push(m._number(">d")),
    ord("X"): lambda m: m._push(m._text(m._number("<I"))),
    0x8C: lambda m: m._push(m._text(m._number("<B"))),
    0x8D: lambda m: m._push(m._text(m._number("<Q"))),
    ord("U"): lambda m: m._push(m._take(m._number("<B")).decode("latin-1")),  # text of Python 2
    ord("T"): lambda m: m._push(m._take(m._number("<I")).decode("latin-1")),
    ord("C"): lambda m: m._push(m._take(m._number("<B"))),
    ord("B"): lambda m: m._push(m._take(m._number("<I"))),
    0x8E: lambda m: m._push(m._take(m._number("<Q"))),
    0x96: lambda m: m._push(m._take(m._number("<Q"))),  # BYTEARRAY8
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m._append([m._stack.pop()]),
    ord("e"): lambda m: m._append(m._items()),
    ord(")"): lambda m: m._push(()),
    0x85: lambda m: m._push(m._pop_many(1)),
    0x86: lambda m: m._push(m._pop_many(2)),
    0x87: lambda m: m._push(m._pop_many(3)),
    ord("t"): lambda m: m._push(tuple(m._items())),
    ord("}"): lambda m: m._push({}),
    ord("s"): lambda m: m._set(list(m._pop_many(2))),
    ord("u"): lambda m: m._set(m._items()),
    0x8F: lambda m: m._push([]),  # EMPTY_SET: a list serves, and hashes nothing
    0x90: lambda m: m._append(m._items()),
    0x91: lambda m: m._push(m._items()),  # FROZENSET
    ord("h"): lambda m: m._get(m._number("<B")),
    ord("j"): lambda m: m._get(m._number("<I")),
    ord("q"): lambda m: m._put(m._number("<B")),
    ord("r"): lambda m: m._put(m._number("<I")),
    0x94: lambda m: m._put(len(m._memo)),  # MEMOIZE
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: _two(Machine._global),
    ord("R"): _two(Machine._call),
    0x81: _two(Machine._call),  # NEWOBJ
    0x92: _new_object,
    ord("b"): lambda m: m._build(m._stack.pop()),
    ord("Q"): lambda m: m._push(m._persistent(m._stack.pop())),
}
