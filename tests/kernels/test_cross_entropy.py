"""The loss over chunks of tokens: z-loss and a sharded vocabulary.

`test_kernels.py` compares forward and gradients with the plain implementation for many shapes.
"""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.layers import cross_entropy
from kernels.layers.cross_entropy import FOREIGN, IGNORE, linear_cross_entropy, token_losses_


def operands(tokens: int, words: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x, w = torch.randn(tokens, 12, generator=make), torch.randn(words, 12, generator=make)
    targets = torch.randint(0, words, (tokens,), generator=make)
    targets[::5] = IGNORE
    return x, w, targets


def objective(x: Tensor, w: Tensor, targets: Tensor, z: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and z-loss by their definitions, summed over tokens that have a target."""
    logits, counted = x @ w.T, targets != IGNORE
    loss = F.cross_entropy(logits[counted], targets[counted], reduction="sum")
    return loss, z * logits[counted].logsumexp(1).square().sum()


def close(ours: Tensor, exact: Tensor) -> None:
    """Compare fp32 sums over some thousand terms of size 1, which may cancel, with fp64."""
    assert ours.shape == exact.shape
    assert float((ours.double() - exact).norm()) <= 2e-6 * float(exact.norm().clamp(min=1.0))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    tokens=st.integers(0, 40), words=st.integers(1, 130), z=st.sampled_from([0.0, 1e-4, 0.3]),
    chunk=st.integers(1, 2000), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_z_loss_adds_its_gradient_and_not_its_value(
    tokens: int, words: int, z: float, chunk: int, seed: int
) -> None:
    x, w, targets = operands(tokens, words, seed)
    exact = [leaf.double().requires_grad_() for leaf in (x, w)]
    loss, z_loss = objective(exact[0], exact[1], targets, z)
    gradients = torch.autograd.grad(loss + z_loss, exact)
    leaves = (x.requires_grad_(), w.requires_grad_())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy._CHUNK_ELEMENTS, "cpu", chunk)
        ours = linear_cross_entropy(*leaves, targets, None, z)
    for a, b in zip(
        [ours.detach(), *torch.autograd.grad(ours, leaves)], [loss.detach(), *gradients],
        strict=True,
    ):  # fmt: skip
        close(a, b)


class Ranks:
    """Ranks as threads; `all_reduce` waits for all of them."""

    def __init__(self, n: int) -> None:
        self.barrier, self.given = threading.Barrier(n), [torch.empty(0)] * n

    def all_reduce(self, x: Tensor, op: Any = None, group: Any = None) -> None:
        self.given[group.rank()] = x.clone()
        self.barrier.wait(10)
        stack = torch.stack(self.given)
        self.barrier.wait(10)
        x.copy_(stack.amax(0) if op == cross_entropy.dist.ReduceOp.MAX else stack.sum(0))


class Group:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_a_divided_vocabulary(n_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, (x, w, targets) = Ranks(n_ranks), operands(17, 30)
    w[11] = 200.0  # one rank has the maximum; without sharing it, exponentials overflow
    monkeypatch.setattr(cross_entropy.dist, "all_reduce", ranks.all_reduce)
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, "cpu", 50)
    exact = [leaf.double().requires_grad_() for leaf in (x, w)]
    loss, z_loss = objective(exact[0], exact[1], targets, 0.01)
    wanted = [loss.detach(), *torch.autograd.grad(loss + z_loss, exact)]
    found: list[list[Tensor]] = [[] for _ in range(n_ranks)]

    def rank(i: int) -> None:
        leaves = (x.clone().requires_grad_(), w.chunk(n_ranks)[i].clone().requires_grad_())
        ours = linear_cross_entropy(*leaves, targets, Group(i), 0.01)  # type: ignore[arg-type]
        found[i] = [ours.detach(), *torch.autograd.grad(ours, leaves)]

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses, grads_x, grads_w = zip(*found, strict=True)
    close(torch.stack(losses).sum(0), wanted[0])
    close(torch.stack(grads_x).sum(0), wanted[1])
    close(torch.cat(grads_w), wanted[2])


def test_logits_stay_where_no_gradient_is_wanted() -> None:
    logits, targets = torch.randn(5, 9), torch.tensor([1, 2, IGNORE, FOREIGN, 8])
    before = logits.clone()
    _, without = token_losses_(logits, targets, None, 0.5, False)
    assert torch.equal(logits, before)
    _, with_it = token_losses_(logits, targets, None, 0.5, True)
    assert torch.equal(without, with_it) and not torch.equal(logits, before)
    assert (without[2:4] == 0).all() and (logits[2] == 0).all() and (logits[3] > 0).all()


def test_the_loss_of_every_token_is_recorded_and_changes_nothing() -> None:
    x, w, targets = operands(37, 90)
    leaves = (x.requires_grad_(), w.requires_grad_())
    losses = torch.full((37,), 9.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy._CHUNK_ELEMENTS, "cpu", 90 * 8)
        recorded = linear_cross_entropy(*leaves, targets, losses_T=losses)
        plain = linear_cross_entropy(*leaves, targets)
    exact = F.cross_entropy(x @ w.T, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses, exact.detach())
    assert recorded == plain and not losses.requires_grad
    for a, b in zip(
        *(torch.autograd.grad(loss, leaves) for loss in (recorded, plain)), strict=True
    ):
        assert torch.equal(a, b)
