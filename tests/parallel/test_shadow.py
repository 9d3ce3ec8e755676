"""Shadows are counted as real tensors are: what autograd saves of a block, what a view shares, what
is let go of."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.moe.permute import permutation
from models.decoder import Block
from models.documents import DocumentAttention
from models.init import initialize
from models.layers.rope import rope_tables
from parallel.memory.shadow import Ledger, Segment, Shadow, Shadows, extrapolate
from tests.models.families import FAMILIES

SEQUENCES, LENGTH = 2, 40


def saved_bytes(run: Any, skip: set[int]) -> int:
    """Bytes of the storages that autograd saves in `run`, but for those in `skip`."""
    sizes: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        inner = tensor.content if isinstance(tensor, Shadow) else tensor
        storage = inner.untyped_storage()
        if storage._cdata not in skip:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(sizes.values())


def storage_of(tensor: Tensor) -> int:
    inner = tensor.content if isinstance(tensor, Shadow) else tensor
    return inner.untyped_storage()._cdata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd_saves_as_much_of_a_shadow(family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]
    config = replace(config, moe=replace(config.moe, force_balance=True))
    rng = torch.Generator().manual_seed(3)
    positions_BL = torch.arange(LENGTH).repeat(SEQUENCES, 1) % 25  # two documents each
    for index in range(config.n_layers):
        block = Block(config, index)
        initialize(block, config, 0)
        block = block.to(dtype)
        core = DocumentAttention(positions_BL)
        x_TD = torch.randn(SEQUENCES * LENGTH, config.d_model, generator=rng).to(dtype)
        tables = rope_tables(positions_BL.view(-1), config.rope, config.attention.rope_dim)
        skip = {storage_of(t) for t in [x_TD, *block.parameters()]}
        arguments = (x_TD.requires_grad_(), positions_BL.view(-1), tables, core)
        real = saved_bytes(lambda a=arguments, b=block: b(*a), skip)
        assert saved_by_shadows(block, x_TD, positions_BL) == real, f"layer {index}"


def saved_by_shadows(block: Block, x_TD: Tensor, positions_BL: Tensor) -> int:
    """The same, of shadows of the same tensors."""
    with Shadows("cpu") as shadows:
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    given = shadows.given(*parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = nn.Parameter(given)
        x = shadows.given(*x_TD.shape, dtype=x_TD.dtype).requires_grad_()
        positions = shadows.wrap(positions_BL)
        config = block.attention.config
        rope = (positions.shape.numel(), config.rope_dim // 2)
        tables = tuple(shadows.given(*rope, dtype=torch.float32) for _ in range(2))
        core = DocumentAttention(positions)
        skip = {storage_of(t) for t in [x, *block.parameters()]}
        return saved_bytes(lambda: block(x, positions.view(-1), tables, core), skip)


def test_a_storage_is_counted_once_and_until_the_last_view_goes() -> None:
    with Shadows("cpu") as shadows:
        x = torch.empty(10, 10)
        view = x.view(100)[10:20]
        assert shadows.ledger.total == 400
        y = view.exp()
        assert shadows.ledger.total == 440
        del x
        assert shadows.ledger.total == 440
        del view
        assert shadows.ledger.total == 40
        y.mul_(2)
        assert shadows.ledger.total == 40 and shadows.ledger.most == 440
        del y
    assert shadows.ledger.total == 0


def test_integers_have_data_and_host_reads_see_it() -> None:
    ids_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    real = permutation(ids_TK, 3, align=4)
    with Shadows("meta") as shadows:
        shadow = permutation(shadows.wrap(ids_TK), 3, align=4)
        assert shadow.ends_E.device.type == "meta"
        assert shadow.ends_E.tolist() == real.ends_E.tolist() == [4, 8, 12]
        assert shadow.order_P.tolist() == real.order_P.tolist()
        assert int(shadow.counts_E.max()) == 3
        rows = torch.ones(6, 5).index_select(0, shadow.inverse_R - shadow.inverse_R)
        assert rows.shape == (6, 5)
        with pytest.raises(RuntimeError, match="meta"):
            float(rows.sum())


def test_a_shadow_outside_its_mode_is_an_error() -> None:
    with Shadows("cpu"):
        x = torch.ones(3)
    with pytest.raises(RuntimeError, match="outside its mode"):
        x + 1


def test_a_replayed_record_has_its_peak_on_top_of_what_is_there() -> None:
    ledger = Ledger()

    def run(mark: Any) -> None:
        ledger.add("a", 10)
        ledger.add("b", 5)
        ledger.add("a", -10)
        mark("half")
        ledger.add("b", 1)

    trace = ledger.record(run)
    first, mark, second = trace
    assert isinstance(first, Segment) and isinstance(second, Segment) and mark == "half"
    assert (first.peak.total(), first.net.total(), second.net["b"]) == (15, 5, 1)
    other = Ledger()
    other.add("c", 100)
    for step in (first, second):
        other.replay(step)
    assert other.total == 106 and other.most == 115 and other.peak["a"] == 10


def test_a_trace_at_two_sizes_tells_that_of_a_third() -> None:
    def run(size: int) -> list[Segment | str]:
        with Shadows("cpu") as shadows:

            def work(mark: Any) -> None:
                kept = torch.empty(size, 8).exp()
                mark("then")
                del kept
                torch.empty(5).add(1)

            return shadows.ledger.record(work)

    assert extrapolate(run(10), run(20), 3.0) == run(40)
