"""The optimizer, against torchtitan's container with the same groups; its state by name."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import OptimizerConfig
from models.decoder import Decoder
from models.init import initialize
from tests.models.families import FAMILIES
from train.garbage_collection import GarbageCollection
from train.optim.optimizer import build_optimizer, optimizer_tensors, set_learning_rate
from train.report import peak_flops

_NO_DECAY = r"(norm|router)\.weight$|\.bias$|\.b13$|\.b2$|\.sinks$"
"""The parameters that models.parameters must list for these families, as a pattern."""
CONFIG = OptimizerConfig(lr=3e-2, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6)


def model() -> Decoder:
    made = Decoder(FAMILIES["gpt-oss"])  # biases, sinks, norms
    initialize(made, made.config, 0)
    return made


def take_step(decoder: Decoder, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in decoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def of_torchtitan(decoder: Decoder) -> Any:
    """torchtitan's container, with each parameter in the first matching group."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    common = {"lr": CONFIG.lr, "betas": (CONFIG.beta1, CONFIG.beta2), "eps": CONFIG.eps}
    groups = [
        ParamGroupConfig(
            pattern=pattern, optimizer_name="AdamW",
            optimizer_kwargs=common | {"weight_decay": decay},
        )
        for pattern, decay in ((_NO_DECAY, 0.0), (".*", CONFIG.weight_decay))
    ]  # fmt: skip
    options = OptimizersContainer.Config(param_groups=groups, implementation="fused")
    return OptimizersContainer(options, model_parts=[decoder])


def test_steps_and_names_are_those_of_torchtitans_container() -> None:
    ours, theirs = model(), model()
    optimizer, container = build_optimizer(ours, CONFIG), of_torchtitan(theirs)
    assert len(optimizer.param_groups) == 2
    for step in (1, 2, 3):
        for decoder, stepping in ((ours, optimizer), (theirs, container)):
            take_step(decoder, step)
            stepping.step()
            stepping.zero_grad()
    state = {k: v for k, v in container.state_dict().items() if isinstance(v, Tensor)}
    found = optimizer_tensors(optimizer)
    assert found.keys() == state.keys() and len(found) == 3 * len(list(ours.parameters()))
    for name, tensor in state.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_state_is_live_and_takes_up_where_it_was(moments: Any) -> None:
    """A resume only fills the tensors of a new optimizer."""
    first, second = model(), model()
    done, resumed = (build_optimizer(each, CONFIG, moments) for each in (first, second))
    for step in (1, 2):
        take_step(first, step)
        done.step()
    before = [p.detach().clone() for p in second.parameters()]
    live = optimizer_tensors(resumed)
    assert all(map(torch.equal, before, second.parameters()))  # creating state changes no weight
    assert all(parameter.grad is None for parameter in second.parameters())
    dtype = torch.bfloat16 if moments == "bf16" else torch.float32
    assert {t.dtype for name, t in live.items() if ".exp_avg" in name} == {dtype}
    assert {t.dtype for name, t in live.items() if name.endswith(".step")} == {torch.float32}
    with torch.no_grad():
        for name, tensor in optimizer_tensors(done).items():
            live[name].copy_(tensor)
        for mine, other in zip(first.parameters(), second.parameters(), strict=True):
            other.copy_(mine)
    for decoder, optimizer in ((first, done), (second, resumed)):
        set_learning_rate(optimizer, 0.01)
        take_step(decoder, 3)
        optimizer.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert all(torch.equal(optimizer_tensors(done)[name], tensor) for name, tensor in live.items())


def test_a_learning_rate_of_zero_stops_all_groups() -> None:
    decoder = model()
    before = [p.detach().clone() for p in decoder.parameters()]
    optimizer = build_optimizer(decoder, CONFIG)
    set_learning_rate(optimizer, 0.0)
    take_step(decoder, 1)
    optimizer.step()
    assert all(map(torch.equal, before, decoder.parameters()))


@pytest.fixture
def collector() -> Iterator[None]:
    was = gc.isenabled()
    yield
    gc.enable() if was else gc.disable()


def test_garbage_is_collected_at_these_steps_only(collector: None) -> None:
    class Node:
        itself: object = None

    gone: list[int] = []
    garbage = GarbageCollection(every=3)
    for step in range(1, 8):
        node = Node()
        node.itself = [node]  # a reference cycle: no reference count frees it
        gc_before = len(gone)
        weakref.finalize(node, gone.append, step)
        del node
        garbage.run(step)
        assert (len(gone) > gc_before) == (step % 3 == 0), step
    assert sorted(gone) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 3060", None)],
)
def test_the_peak_of_a_device_nobody_knows_is_not_that_of_another(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # the table calls lspci first, which reports this machine
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops.peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops.peak_flops(torch.device("cpu")) is None
