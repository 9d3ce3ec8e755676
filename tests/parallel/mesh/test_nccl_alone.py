"""On CUDA only the default group has gloo: torch's functions are replaced by records of their
arguments, since NCCL needs GPUs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.parallel_dims import ParallelDims
from parallel import mesh, ranks, rendezvous
from parallel.dispatch import factory
from parallel.launch_environment import read_launch_environment


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def record(*_: Any, **options: Any) -> object:
        calls.append(options)
        return object()

    monkeypatch.setattr(mesh, "init_device_mesh", record)
    monkeypatch.setattr(dist, "new_group", record)
    monkeypatch.setattr(dist, "init_process_group", record)
    return calls


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [("cuda", "cpu:gloo,cuda:nccl", "cuda:nccl"), ("cpu", "cpu:gloo", None),
     ("cuda", "cpu:fake,cuda:fake", None)],
)  # fmt: skip
def test_groups_of_meshes(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, device: str, backend: str,
    expected: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(dist, "get_backend_config", lambda _=None: backend)
    mesh.build(ParallelDims(dp_replicate=1, dp_shard=4, tp=1, ep=2, etp=1, efsdp=2), device)
    assert len(made) == 3
    for options in made:
        given = options["backend_override"]
        assert given == (expected and dict.fromkeys(options["mesh_dim_names"], expected))


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "cpu:gloo"])
def test_groups_of_the_two_level_dispatch(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda _=None: backend)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0, 1, 2, 3])
    monkeypatch.setattr(dist, "get_rank", lambda _: 1)
    factory._groups_of_levels(object(), [0, 0, 1, 1])  # type: ignore[arg-type]
    expected = "cuda:nccl" if "nccl" in backend else None
    assert [options["backend"] for options in made] == [expected, expected]


def test_the_default_group_knows_its_device(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, store = read_launch_environment(), dist.HashStore()
    device = torch.device("cuda", 3)
    rendezvous.join(store, "cpu:gloo,cuda:nccl", place, device)
    rendezvous.join(store, "gloo", place)
    assert [options["device_id"] for options in made] == [device, None]
    # start_ranks passes it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(ranks, "meet", lambda _: store)
    ranks.start_ranks()
    assert made[-1]["device_id"] == torch.device("cuda", 0)
