"""The pickle machine: what checkpoints hold is read, nothing is run, and no claim costs time or memory."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pangu.tensor_files import torch_pickle
from pangu.tensor_files.torch_pickle import MAX_OPCODES, Global, Machine, Opaque, PickleError


def run(data: bytes) -> Any:
    return Machine(data, persistent=lambda identity: ("persistent", identity), calls={"__builtin__.set": lambda args: "a set"}).run()[0]


PLAIN = {
    "none": None,
    "flags": [True, False],
    "numbers": (0, 1, 255, 256, 65536, -1, -(2**31), 2**40, 2**200, 1.5, -0.0),
    "text": ["", "pangu", "盘古", "x" * 300],
    "bytes": (b"", b"\x00" * 300),
    "nested": {"a": [{"b": ()}, ((1,), (2, 3), (4, 5, 6, 7))]},
    3: "an integer key",
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_are_read(protocol: int) -> None:
    assert run(pickle.dumps(PLAIN, protocol)) == PLAIN


def test_protocol_2_writes_bytes_as_a_call() -> None:
    """It has no opcode for them."""
    value = run(pickle.dumps([1, "a", b"\xff"], 2))
    assert value[:2] == [1, "a"]
    assert isinstance(value[2], Opaque) and value[2].name == "_codecs.encode" and value[2].args == ("\xff", "latin1")


def test_a_shared_or_cyclic_value_is_one_value() -> None:
    inner: list[Any] = [1]
    inner.append(inner)
    value = run(pickle.dumps([inner, inner], 2))
    assert value[0] is value[1] and value[0][1] is value[0]


def test_objects_are_inert() -> None:
    value = run(pickle.dumps({"args": argparse.Namespace(num_layers=31), "rng": np.random.RandomState(1).get_state()}, 2))
    assert isinstance(value["args"], Opaque) and value["args"].name == "argparse.Namespace"
    assert value["args"].state == {"num_layers": 31}
    assert value["rng"][0] == "MT19937" and isinstance(value["rng"][1], Opaque)
    ordered = run(pickle.dumps(collections.OrderedDict(a=1), 2))
    assert isinstance(ordered, Opaque)  # nobody told the machine what to make of it


def test_persistent_ids_and_known_calls_are_handed_out() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", 1) if value == "theirs" else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(["theirs", {1}])
    assert run(buffer.getvalue()) == [("persistent", ("storage", 1)), "a set"]


def test_several_pickles_in_a_row() -> None:
    data = pickle.dumps(1, 2) + pickle.dumps("two", 2)
    first, end = Machine(data, persistent=lambda identity: None, calls={}).run()
    second, end = Machine(data, end, persistent=lambda identity: None, calls={}).run()
    assert (first, second, end) == (1, "two", len(data))


# --- nothing is run ----------------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


class Stateful:
    """Runs code where it is given its state."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: Any) -> None:
        Path(state["path"]).touch()


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_pickle_runs(protocol: int, tmp_path: Path) -> None:
    """Each of these makes a file when Python's own pickle reads it, or the test would show nothing."""
    attempts = {
        "os.system": lambda file: Call(os.system, f"touch {file}"),
        "exec": lambda file: Call(exec, f"open({str(file)!r}, 'w')"),
        "open": lambda file: Call(open, str(file), "w"),
        "getattr": lambda file: Call(getattr, Call(getattr, Path(file), "touch"), "__call__"),
        "setstate": lambda file: Stateful(str(file)),
        "inside a dictionary's key": lambda file: {("a", Call(os.system, f"touch {file}")): 1},
    }
    for name, attempt in attempts.items():
        theirs, ours = tmp_path / f"theirs {name}".replace(" ", "-").replace("'", ""), tmp_path / "ours"
        data = pickle.dumps(attempt(theirs), protocol)
        value = pickle.loads(data)
        if name == "getattr":
            value()
        assert theirs.exists(), name
        run(pickle.dumps(attempt(ours), protocol))
        assert list(tmp_path.glob("ours*")) == [], name


def test_no_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_on_import.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    value = run(b"\x80\x02chostile_on_import\nThing\n)R.")
    assert isinstance(value, Opaque) and value.name == "hostile_on_import.Thing"
    assert "hostile_on_import" not in sys.modules


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cposix\nsystem\n(S'true'\ntR.",  # text opcodes of protocol 0
        b"(ios\nsystem\n.",  # INST
        b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02]2.",  # DUP
        b"\x80\x02Pid\n.",  # PERSID
        b"\x80\x02K\x01)R.",  # a call of a number
        b"\x80\x02cos\nsystem\nK\x01R.",  # arguments that are no tuple
        b"\x80\x02K\x01K\x02a.",  # appends to a number
        b"\x80\x02]K\x01K\x02s.",  # an item of a list
        b"\x80\x02}(K\x01u.",  # a key without a value
        b"\x80\x04K\x01K\x02\x93.",  # names that are no text
        b"\x80\x06N.",
        b"\x80\x02h\x00.",  # never put
        b"\x80\x02q\x00.",  # nothing to put
        b"\x80\x02t.",
        b"\x80\x02\x86.",
        b"\x80\x02e.",
        b"\x80\x02.",
        b"\x80\x02N",
        b"\x80",
        b"",
        b"\x80\x02X\x02\x00\x00\x00\xff\xff.",  # no UTF-8
        b"\x80\x02c" + b"a" * 1000 + b"\nb\n.",
    ],
)
def test_what_no_checkpoint_needs_is_refused(data: bytes) -> None:
    with pytest.raises(PickleError):
        run(data)


# --- bombs -------------------------------------------------------------------------------------------------------------------------------


def measured(data: bytes) -> tuple[float, int]:
    """(seconds, peak bytes) of reading or refusing a pickle, its value's destruction included."""
    tracemalloc.start()
    began = time.process_time()
    try:
        run(data)
    except PickleError:
        pass
    finally:
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, peak


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of 2**32 entries
        b"\x80\x04\x8d" + HUGE + b"a.",
        b"\x80\x04\x8e" + HUGE + b"a.",
        b"\x80\x05\x96" + HUGE + b"a.",
        b"\x80\x04\x95" + HUGE + b"N.",  # a frame: a hint, not a claim
        b"\x80\x02\x8b\xff\xff\xff\x7fa.",
        b"\x80\x02\x8b\xff\xff\xff\xffa.",  # of negative length
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02T\xff\xff\xff\xffa.",
        b"\x80\x02B\xff\xff\xff\xffa.",
    ],
)
def test_a_claim_costs_nothing(data: bytes) -> None:
    seconds, peak = measured(data)
    assert seconds < 0.1 and peak < 100_000


def test_nested_tuples_are_not_hashed() -> None:
    """The hash of the last of n nested pairs takes 2^n steps."""
    pairs = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"0" for n in range(60))
    data = b"\x80\x02)q\x000" + pairs + b"}h" + bytes([60]) + b"K\x01s."
    assert measured(data)[0] < 0.1


def test_colliding_keys_do_not_pile_up() -> None:
    """All multiples of 2^61 - 1 have the same hash: a dictionary of n of them takes n^2 steps."""
    keys = b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(1, 10_000))
    assert measured(b"\x80\x02}(" + keys + b"u.")[0] < 1.5


DEEP = {
    "lists": b"](" * 100_000 + b"e" * 100_000,
    "tuples": b")" + b"\x85" * 200_000,
    "marks": b"(" * 200_000,
    "dictionaries": b"}" + b"K\x01}" * 100_000 + b"s" * 100_000,
    "a list of itself": b"]q\x00" + b"h\x00a" * 100_000,
}


@pytest.mark.parametrize("what", DEEP)
def test_deep_nesting_is_read_and_destroyed(what: str) -> None:
    began = time.process_time()
    with contextlib.suppress(PickleError):
        run(b"\x80\x02" + DEEP[what] + b".")
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("what", DEEP)
def test_memory_goes_with_the_size(what: str) -> None:
    data = DEEP[what]
    part = data[: len(data) // 50]
    assert measured(b"\x80\x02" + part + b".")[1] < 150 * len(part)


def test_the_number_of_opcodes_is_limited() -> None:
    with pytest.raises(PickleError, match="opcodes"):
        run(b"\x80\x02" + b"N0" * MAX_OPCODES + b"N.")


def test_the_size_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_BYTES", 1000)
    with pytest.raises(PickleError, match="cut off"):
        run(pickle.dumps("x" * 2000))


def test_mutated_pickles_are_read_or_refused() -> None:
    source = random.Random(7)
    original = pickle.dumps(PLAIN | {"object": argparse.Namespace(a=collections.OrderedDict(b=1))}, 2)
    refused = 0
    for _ in range(3000):
        data = bytearray(original)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            run(bytes(data))
        except PickleError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 200
    assert 500 < refused < 3000


def test_names_are_values() -> None:
    assert run(b"\x80\x02ctorch\nFloatStorage\n.") == Global("torch.FloatStorage")
