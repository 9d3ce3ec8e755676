"""The memory for snapshots: the image of a file, of tensors of any layout, also with a pinned
buffer."""

import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from models.layers.box import Box
from train.checkpoint import host_buffer
from train.checkpoint.host_buffer import HostBuffer, available_host_memory
from train.checkpoint.saving import part_of

CPU = torch.device("cpu")
TENSORS = {
    "t": torch.arange(12.0).view(3, 4).t(),
    "b": torch.arange(5).bfloat16(),
    "s": torch.tensor(True),
    "n": torch.arange(6)[::2],
}


def image(device: torch.device) -> dict[str, torch.Tensor]:
    part = part_of("x", {name: (Box.all_of(t.shape), t.dtype) for name, t in TENSORS.items()})
    buffer = HostBuffer(part.layout.size, device)
    try:
        for _ in range(2):  # it is used again
            buffer.fill(part.layout, TENSORS)
            with mmap.mmap(buffer.descriptor, 0) as other:
                found = load(other[: part.layout.size])
    finally:
        buffer.close()
    return found


def test_a_snapshot_is_a_file_that_another_process_can_read() -> None:
    found = image(CPU)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("error", [0, 2])
def test_on_cuda_it_is_pinned_if_possible(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}

    def register(place: int, size: int, flags: int) -> int:
        if not error:
            pinned[place] = size
        return error

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    found = image(torch.device("cuda"))
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert not pinned, "it is released"


def test_more_memory_than_there_is_is_never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    available = available_host_memory()
    assert available is None or 2**20 < available < 2**50
    # the system would end other processes instead of refusing it
    monkeypatch.setattr("os.posix_fallocate", lambda *_: pytest.fail("allocated"))
    monkeypatch.setattr(host_buffer, "available_host_memory", lambda: 1000)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        HostBuffer(1001, CPU)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        HostBuffer(501, CPU, n_buffers=2)


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    names = {"limit": "memory.max", "used": "memory.current", "stat": "memory.stat"}
    for key, text in (
        ("limit", "1000"),
        ("used", "700"),
        ("stat", "anon 400\ninactive_file 200\n"),
    ):
        (tmp_path / names[key]).write_text(text)
    find = host_buffer._left_in_group
    assert find(tmp_path, "/", "max", "current", "") == [], "no figure is guessed"
    (tmp_path / names["stat"]).write_text("anon 400\ninactive_file 200\nactive_file 50\n")
    assert find(tmp_path, "/", "max", "current", "") == [550]
    (tmp_path / names["limit"]).write_text("max\n")
    assert find(tmp_path, "/", "max", "current", "") == []
