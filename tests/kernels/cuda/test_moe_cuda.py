"""Row movement, the router and whole layers on a CUDA device: results equal the references, and the
host never waits."""

from collections.abc import Iterator

import pytest
import torch

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from configs.precision import FP8Config
from kernels.grouped_gemm.grouped_gemm_fp8 import row_alignment
from kernels.moe import permute
from kernels.moe.permute import Permutation
from kernels.moe.router import RouterOptions, route, route_backward_reference, route_reference
from models.decoder import Decoder
from models.fp8 import apply_fp8
from models.init import initialize
from models.moe import LocalDispatcher, MoE
from models.step_context import LayerContext
from tests.step_contexts import layer_step, next_microbatch, totals_of

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Calls once before the check, because compilation may wait."""
    torch.manual_seed(0)
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_rows(absent: float, align: int) -> None:
    ids = torch.stack([torch.randperm(16)[:6] for _ in range(1000)])
    ids[torch.rand(ids.shape) < absent] = 16
    x = torch.randn(1000, 1030).bfloat16()
    ids_there, x_there = ids.cuda(), x.cuda().requires_grad_()

    def there_and_back() -> tuple[Permutation, torch.Tensor, torch.Tensor, torch.Tensor]:
        to = permute.permutation(ids_there, 16, align)
        rows = permute.gather_rows(x_there, to)
        back = permute.combine_rows(rows, to, 6)
        return to, rows, back, torch.autograd.grad(back, x_there, torch.ones_like(back))[0]

    there_and_back()
    torch.cuda.set_sync_debug_mode("error")
    to, rows, back, gradient = there_and_back()
    torch.cuda.set_sync_debug_mode("default")
    to = Permutation(*(part.cpu() for part in to))
    expected = permute.permutation_reference(ids, 16, align)
    assert torch.equal(to.order_P[: len(expected.order_P)], expected.order_P)
    assert (to.order_P[len(expected.order_P) :] == -1).all()
    assert all(torch.equal(a, b) for a, b in zip(to[1:], expected[1:], strict=True))
    reference = permute.gather_rows_reference(x, to)
    assert torch.equal(rows.cpu(), reference)
    exact = permute.combine_rows_reference(reference, to, 6).float()
    assert (back.cpu().float() - exact).norm() < 1e-3 * exact.norm()
    named = (ids < 16).sum(1, keepdim=True).float()
    assert torch.equal(gradient.cpu().float(), named.expand(x.shape))


@pytest.mark.parametrize(
    "rule", [RouterOptions(8, True), RouterOptions(8, False, 8, 4, True, 2.5)], ids=str
)
def test_route(rule: RouterOptions) -> None:
    logits, bias = torch.randn(1000, 256), torch.randn(256) * 0.01
    there, bias_there = logits.cuda().requires_grad_(), bias.cuda()
    grad = torch.randn(1000, 8)
    grad_there = grad.cuda()

    def step() -> tuple[torch.Tensor, ...]:
        ids, weights, counts = route(there, bias_there, rule)
        return ids, weights, counts, torch.autograd.grad(weights, there, grad_there)[0]

    step()
    torch.cuda.set_sync_debug_mode("error")
    found = step()
    torch.cuda.set_sync_debug_mode("default")
    ids, weights, counts, gradient = (part.cpu() for part in found)
    # the device's exponential differs in its last bit, so adjacent ranks may swap
    assert (ids != route_reference(logits, bias, rule)[0]).float().mean() < 1e-3
    _, expected, counted = route_reference(logits, bias, rule, ids)
    assert torch.equal(counts, counted)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    reference = route_backward_reference(grad, logits, ids, rule)
    assert (gradient - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("fp8", [False, True])
def test_layer_does_not_wait(fp8: bool) -> None:
    """Forward and backward of a whole layer, as in sharded training, against the CPU."""
    moe = MoEConfig(
        n_experts=16, top_k=4, d_expert=256, n_shared_experts=1, seq_aux_loss_coef=0.1,
        global_aux_loss_coef=0.1, router_z_loss_coef=0.1,
    )  # fmt: skip
    attention = AttentionConfig(n_heads=1, head_dim=64)
    config = ModelConfig(vocab_size=4, d_model=256, n_layers=1, attention=attention, moe=moe)
    model = Decoder(config)
    initialize(model, config, seed=1)
    if fp8:
        apply_fp8(model, FP8Config())
    (block,) = model.blocks()
    layer = block.ffn
    assert isinstance(layer, MoE)
    x, grad = torch.randn(500, 256), torch.randn(500, 256)

    def context(device: str) -> LayerContext:
        return next_microbatch(layer_step(16, seq_len=125, tokens=500, device=device))

    def step(x: torch.Tensor, grad: torch.Tensor, context: LayerContext) -> list[torch.Tensor]:
        leaf = x.requires_grad_()
        y = layer(leaf, context)
        gradients = torch.autograd.grad(y, (leaf, *layer.parameters()), grad)
        return [y, *gradients, totals_of(context).losses_3]

    expected = step(x, grad, context("cpu"))
    layer.cuda()
    if fp8:
        layer.dispatcher = LocalDispatcher(16, row_alignment("cuda"))
    there = x.detach().cuda(), grad.cuda()
    contexts = context("cuda"), context("cuda")
    step(*there, contexts[0])
    torch.cuda.set_sync_debug_mode("error")
    found = step(*there, contexts[1])
    torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.cpu() - theirs).norm() < (2e-2 if fp8 else 1e-3) * theirs.norm()
