"""Peak memory is exact for allocations that are known, and a limit on memory makes an allocation fail in the open."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.common import memory
from bench.common.memory import free_bytes, held_to_free_memory, peak_bytes, tensor_bytes
from trainer.monitor.out_of_memory import is_out_of_memory

CPU = torch.device("cpu")
KIB = 1024


def _bytes(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_the_highest_point_not_the_sum_nor_the_end() -> None:
    def call() -> torch.Tensor:
        first = _bytes(40)
        second = _bytes(30)
        del first
        third = _bytes(35)  # 65 alive: less than the 70 before
        del second, third
        return _bytes(10)

    assert peak_bytes(call, CPU) == 70 * KIB
    assert peak_bytes(call, CPU) == 70 * KIB  # what the first call left behind does not count in the second


def test_temporaries_inside_an_operation_count() -> None:
    x = torch.rand(8 * KIB)
    scalar_bytes = 4
    assert peak_bytes(x.sum, CPU) == scalar_bytes
    assert peak_bytes(x.median, CPU) == scalar_bytes + 32 * KIB  # it sorts a copy that no line of Python ever holds


def test_what_is_alive_before_and_freed_meanwhile_is_not_counted() -> None:
    held = [_bytes(100)]

    def call() -> None:
        held.clear()
        _bytes(20)

    assert peak_bytes(call, CPU) == 20 * KIB


def test_blocks_of_an_earlier_profile_are_not_taken_for_others() -> None:
    """Their release was not seen; the profiler reports one when something else is released at the same address."""
    reused = 0
    for attempt in range(200):
        kib = (1, 4, 8, 16, 64, 200)[attempt % 6]
        kept: list[torch.Tensor] = []
        assert peak_bytes(lambda size=kib, kept=kept: kept.append(_bytes(size)), CPU) == kib * KIB
        address = kept.pop().data_ptr()
        held = [block for block in (_bytes(max(kib // 2, 1)), _bytes(kib)) if block.data_ptr() == address]
        reused += len(held)

        def call(held: list[torch.Tensor] = held) -> None:
            held.clear()
            _bytes(3)

        assert peak_bytes(call, CPU) == 3 * KIB
        if reused >= 3:
            return
    if not reused:
        pytest.skip("the allocator of this machine gave no address a second time")


def test_adding_up_goes_by_address() -> None:
    changes = [(0, 100, 8), (1, 200, 4), (2, 300, -64), (3, 100, -8), (4, 400, 5)]
    assert memory._highest(changes) == 12
    assert memory._highest([]) == 0


def test_a_backward_pass_to_the_byte() -> None:
    layer = nn.Linear(64, 32, bias=False)
    x = torch.rand(16, 64)

    def step() -> None:
        layer(x).sum().backward()

    step()
    layer.zero_grad()
    # In the backward pass: the sum and its gradient, that gradient spread over the outputs, the weight's gradient.
    assert peak_bytes(step, CPU) == 4 + 4 + 16 * 32 * 4 + 64 * 32 * 4


def test_shared_storage_counts_once() -> None:
    x = torch.zeros(256)
    assert tensor_bytes([x, x[:10], x.view(16, 16), torch.zeros(4)]) == 1024 + 16


def test_an_allocation_beyond_free_memory_fails_and_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 256 * KIB * KIB)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with held_to_free_memory(CPU):
        assert resource.getrlimit(resource.RLIMIT_DATA) != before
        _bytes(64 * KIB)
        with pytest.raises(RuntimeError) as caught:
            _bytes(512 * KIB)
    assert is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    _bytes(512 * KIB)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_other_errors_are_no_lack_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_free_memory_is_known_here_and_plausible() -> None:
    free = free_bytes()
    assert free is not None and KIB**2 < free < 1024 * KIB**3 * KIB


def test_a_containers_cache_of_files_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its account has it under what is used, up to the limit after a large installation."""
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 2500\nactive_file 1400\nsock 7\n")
    (tmp_path / "memory.max").write_text("max\n")
    without = free_bytes()
    assert without is None or without > 6000
    (tmp_path / "memory.max").write_text("6000\n")
    assert free_bytes() == 6000 - (5000 - 2500 - 1400)


@pytest.mark.gpu
def test_the_peak_on_cuda() -> None:
    device = torch.device("cuda")

    def call() -> None:
        first = torch.empty(4 * KIB * KIB, dtype=torch.uint8, device=device)
        second = torch.empty(2 * KIB * KIB, dtype=torch.uint8, device=device)
        del first
        third = torch.empty(KIB * KIB, dtype=torch.uint8, device=device)
        del second, third

    assert peak_bytes(call, device) == pytest.approx(6 * KIB * KIB, abs=KIB * KIB)  # its allocator rounds
