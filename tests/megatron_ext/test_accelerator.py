"""The device layer over DeepSpeed's: fake CUDA and Ascend accelerators stand in for the machines."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from helpers.harness import run_distributed

from megatron_ext import accelerator
from megatron_ext.errors import RendezvousError
from megatron_ext.supervision import rendezvous


class FakeAccelerator:
    """What a DeepSpeed accelerator of this device answers."""

    def __init__(self, name: str, backend: str) -> None:
        self._name, self._backend = name, backend
        self.calls: list[tuple[str, Any]] = []
        self.state = torch.zeros(16, dtype=torch.uint8)

    def communication_backend_name(self) -> str:
        return self._backend

    def current_device_name(self) -> str:
        return f"{self._name}:3"

    def set_device(self, index: int) -> None:
        self.calls.append(("set_device", index))

    def is_fp64_supported(self) -> bool:
        return True

    def is_bf16_supported(self) -> bool:
        return self._name != "cpu"

    def is_fp16_supported(self) -> bool:
        return self._name == "cuda"

    def get_rng_state(self) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state

    def synchronize(self) -> None:
        self.calls.append(("synchronize", None))

    def max_memory_allocated(self) -> int:
        return 12345

    def pin_memory(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(("pin_memory", x))
        return x.clone()


class FakeCuda(FakeAccelerator):
    pass


class FakeNpu(FakeAccelerator):
    pass


def pretend(monkeypatch: pytest.MonkeyPatch, fake: FakeAccelerator, model: str) -> FakeAccelerator:
    """DeepSpeed finds `fake`, and torch calls its device `model`."""
    namespace = SimpleNamespace(current_device=lambda: 3, get_device_name=lambda index: {3: model}[index])
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: fake)
    monkeypatch.setattr(torch, fake._name, namespace, raising=False)
    return fake


DEVICES = [
    (FakeCuda, "cuda", "nccl", "NVIDIA A100-SXM4-80GB", 312e12),
    (FakeCuda, "cuda", "nccl", "NVIDIA H100 80GB HBM3", 989e12),
    (FakeCuda, "cuda", "nccl", "NVIDIA H200", 989e12),
    (FakeCuda, "cuda", "nccl", "Tesla V100-SXM2-32GB", 125e12),
    (FakeCuda, "cuda", "nccl", "NVIDIA GeForce RTX 4090", None),
    (FakeNpu, "npu", "hccl", "Ascend910A", 256e12),
    (FakeNpu, "npu", "hccl", "Ascend910B2", None),
]


@pytest.mark.parametrize(("kind", "name", "backend", "model", "peak"), DEVICES)
def test_names_of_a_device(
    kind: type[FakeAccelerator], name: str, backend: str, model: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, kind(name, backend), model)
    assert (accelerator.name(), accelerator.backend(), accelerator.device_name()) == (name, backend, model)
    assert accelerator.peak_flops() == peak
    assert accelerator.max_memory_allocated() == 12345


def test_the_device_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FakeCuda("cuda", "nccl"), "NVIDIA A100-SXM4-80GB")
    assert accelerator.device() == torch.device("cuda:3")
    assert [accelerator.supports(precision) for precision in ("fp32", "bf16", "fp16")] == [True, True, True]


def test_precisions_are_as_deepspeed_judges_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FakeNpu("npu", "hccl"), "Ascend910A")
    assert [accelerator.supports(precision) for precision in ("fp32", "bf16", "fp16")] == [True, True, False]


def test_the_default_generator_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pretend(monkeypatch, FakeNpu("npu", "hccl"), "Ascend910A")
    on_host = torch.get_rng_state()
    accelerator.set_rng_state(torch.ones(16, dtype=torch.uint8))
    assert torch.equal(accelerator.get_rng_state(), fake.state) and fake.state.sum() == 16
    assert torch.equal(torch.get_rng_state(), on_host)
    accelerator.synchronize()
    assert fake.calls == [("synchronize", None)]


def test_memory_is_page_locked_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3)
    assert accelerator.pin(x) is x
    fake = pretend(monkeypatch, FakeCuda("cuda", "nccl"), "NVIDIA A100-SXM4-80GB")
    pinned = accelerator.pin(x)
    assert pinned is not x and torch.equal(pinned, x) and fake.calls[-1] == ("pin_memory", x)


def test_this_machine() -> None:
    assert (accelerator.name(), accelerator.backend(), accelerator.device_name()) == ("cpu", "gloo", "CPU")
    assert accelerator.device() == torch.device("cpu")
    assert accelerator.peak_flops() is None and accelerator.max_memory_allocated() == 0
    state = accelerator.get_rng_state()
    drawn = torch.rand(3)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `deepspeed.init_distributed` is called with, and the environment it sees."""
    seen: dict[str, Any] = {}

    def init_distributed(**arguments: Any) -> None:
        seen.update(arguments, environment=dict(os.environ), calls=list(accelerator._accelerator().__dict__.get("calls", [])))

    monkeypatch.setattr(deepspeed, "init_distributed", init_distributed)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set before it is deleted, so that monkeypatch takes away what `initialize` writes.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    return seen


@pytest.mark.parametrize(("kind", "name", "backend", "has_fp64"), [(FakeCuda, "cuda", "nccl", True), (FakeNpu, "npu", "hccl", False)])
def test_the_device_is_set_before_the_backend_starts(
    kind: type[FakeAccelerator],
    name: str,
    backend: str,
    has_fp64: bool,
    started: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = pretend(monkeypatch, kind(name, backend), "any")
    monkeypatch.setattr(kind, "is_fp64_supported", lambda self: True)  # put back what `initialize` changes
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "2")
    store = object()
    meeting = rendezvous.Rendezvous(5, lambda: store, (("host", 1),) * 8, "rank 0")
    monkeypatch.setattr(rendezvous, "find_ranks", lambda seconds: meeting)
    assert rendezvous.initialize(90.0) == meeting
    assert next(torch.distributed.rendezvous(started["init_method"])) == (store, 5, 8)  # what DeepSpeed will let torch begin with
    assert started["calls"] == [("set_device", 2)]
    assert (started["dist_backend"], started["timeout"]) == (backend, timedelta(seconds=90))
    assert fake.is_fp64_supported() is has_fp64  # HCCL sums no float64


def test_without_a_launcher_the_world_is_of_one(started: dict[str, Any]) -> None:
    rendezvous.initialize(90.0)
    environment = started["environment"]
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")
    assert environment["MASTER_ADDR"] == "127.0.0.1" and 1024 <= int(environment["MASTER_PORT"]) < 65536
    assert started["dist_backend"] == "gloo"


def start_again() -> tuple[bool, bool, int]:
    """A second start that meets where the first did, as after a restart by torchrun; the first left its keys there."""
    first = rendezvous.find_ranks(30.0)
    all_are_in(first)
    first.connect().set("address", "of the first start")
    second = rendezvous.find_ranks(30.0)
    assert [process for _, process in second.members][second.rank] == os.getpid()
    seen = first.connect().check(["address"]), second.connect().check(["address"]), len(set(second.members))
    all_are_in(second)
    return seen


def all_are_in(meeting: rendezvous.Rendezvous) -> None:
    """Rank 0 serves the store: here it must not go on, or end, while others still look into it."""
    store = meeting.connect()
    store.set(f"in {meeting.rank}", "")
    store.wait([f"in {rank}" for rank in range(len(meeting.members))], timedelta(seconds=30))
    time.sleep(0.5)


def test_a_restart_reads_nothing_of_the_start_before() -> None:
    assert run_distributed(start_again, 3) == [(True, False, 3)] * 3


def meet_with_a_rank_of_another_run() -> str:
    os.environ["RANK"] = str(min(int(os.environ["RANK"]), 1))  # the third process is a second rank 1
    os.environ["WORLD_SIZE"] = "2"
    try:
        meeting = rendezvous.find_ranks(2.0)
    except RendezvousError as error:
        return str(error)
    time.sleep(4.0)  # rank 0 serves the store, as long as it holds the meeting
    return f"met {len(meeting.members)}"


def test_two_processes_of_one_rank_do_not_both_get_in() -> None:
    first, *others = run_distributed(meet_with_a_rank_of_another_run, 3)
    assert first == "met 2" and sorted(other == "met 2" for other in others) == [False, True]
    assert "or another process is rank 1 too" in next(other for other in others if other != "met 2")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "1"}, "rank 1: nobody answers at MASTER_ADDR=127.0.0.1 MASTER_PORT=1 within 0 s"),
    ],
)
def test_ranks_that_cannot_meet_say_why(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | environment).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RendezvousError, match=expected):
        rendezvous.find_ranks(0.2)


def lose_a_rank() -> bool | None:
    rendezvous.initialize(30)
    if os.environ["RANK"] == "1":
        torch.distributed.destroy_process_group()
        return None
    try:
        torch.distributed.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return accelerator.is_communication_error(error)
    return None


def test_a_lost_rank_is_told_from_an_error_of_our_own() -> None:
    assert run_distributed(lose_a_rank, 2) == [True, None]
    assert not accelerator.is_communication_error(RuntimeError("shapes do not match"))
    assert not accelerator.is_communication_error(ValueError("Connection closed by peer"))
