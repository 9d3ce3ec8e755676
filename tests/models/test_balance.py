"""The routers' auxiliary losses against plain loops: values, gradients, when they count.

Tolerance 1e-5 of the reference's norm: both sides are fp32 sums of some hundred terms.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configs.loader import load
from configs.model import MoEConfig
from models.balance import NAMES, StepScope
from models.router import Router, open_step, take_counts, take_losses
from tests.runs import TINY

LENGTH, SEQUENCES, WIDTH = 7, 3, 12
KEYS = dict(
    zip(NAMES, ("seq_aux_loss_coef", "global_aux_loss_coef", "router_z_loss_coef"), strict=True)
)


def router(**options: object) -> Router:
    base = load(TINY).model.moe
    made = Router(WIDTH, replace(base, **options))  # type: ignore[arg-type]
    torch.manual_seed(1)
    torch.nn.init.normal_(made.weight, std=0.5)
    torch.nn.init.normal_(made.bias_E, std=0.3)
    return made


def tokens(seed: int, sequences: int = SEQUENCES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences * LENGTH, WIDTH, generator=generator)


def scope(n_tokens: int, reduce: Callable[[Tensor], Tensor] = lambda c: c) -> StepScope:
    return StepScope(LENGTH, torch.tensor(n_tokens), reduce)


def scores_of(made: Router, x: Tensor) -> list[Tensor]:
    """Scores of every token, from its logits one by one."""
    if made.config.score_func == "softmax":
        return [(made.weight @ row).softmax(0) for row in x]
    return [(made.weight @ row).sigmoid() for row in x]


def sequence_loop(made: Router, x: Tensor) -> Tensor:
    """DeepSeek-V3, eq. 17-20, sequence by sequence; the mean over sequences."""
    moe, losses = made.config, []
    for start in range(0, len(x), LENGTH):
        scores = scores_of(made, x[start : start + LENGTH])
        total = torch.zeros(())
        for i in range(moe.n_experts):
            hits = sum(i in s.topk(moe.top_k).indices for s in scores)
            p = sum((s[i] / s.sum() for s in scores), torch.zeros(())) / LENGTH
            total = total + moe.n_experts / (moe.top_k * LENGTH) * hits * p
        losses.append(total)
    return torch.stack(losses).mean()


def global_loop(made: Router, x: Tensor, seen: Tensor) -> Tensor:
    """arXiv:2501.11873 with the choices among all tokens `seen`; the mean of P over `x`."""
    moe = made.config
    made.eval()
    ids = made(seen)[0].flatten().tolist()
    made.train()
    scores, total = scores_of(made, x), torch.zeros(())
    for i in range(moe.n_experts):
        p = sum((s[i] / s.sum() for s in scores), torch.zeros(())) / len(x)
        total = total + moe.n_experts * ids.count(i) / len(ids) * p
    return total


def z_loop(made: Router, x: Tensor) -> Tensor:
    """ST-MoE, eq. 5."""
    squares = [(made.weight @ row).exp().sum().log() ** 2 for row in x]
    return torch.stack(squares).mean()


def gradient_of_losses(made: Router, batches: list[Tensor], main: Tensor) -> Tensor:
    """Gradient of the router's weight from the auxiliary losses alone: with and without them."""
    grads: list[Tensor] = []
    for on in (True, False):
        made.weight.grad, made.scope = None, None
        take_counts(made, lambda c: c)
        if on:
            open_step(made, scope(sum(map(len, batches))))
        for x in batches:
            (made(x)[1] * main[: len(x)]).sum().backward()
        assert made.weight.grad is not None
        grads.append(made.weight.grad.clone())
    return grads[0] - grads[1]


SETTINGS: list[dict[str, object]] = [
    {},
    {"score_func": "softmax", "norm_top_k": False},
    {"n_groups": 4, "top_groups": 2},
    {"top_k": 1},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_plain_loops(name: str, options: dict[str, object]) -> None:
    coefficient = 0.7
    made = router(**options, **{KEYS[name]: coefficient})
    x = tokens(0)
    loop = {
        "sequence_balance": lambda: sequence_loop(made, x),
        "global_balance": lambda: global_loop(made, x, x),
        "router_z": lambda: z_loop(made, x),
    }[name]
    loss = loop()
    (gradient,) = torch.autograd.grad(coefficient * loss, made.weight)
    expected = float(loss.detach())
    main = torch.randn(len(x), made.config.top_k, generator=torch.Generator().manual_seed(3))
    found = gradient_of_losses(made, [x], main)
    assert (found - gradient).norm() < 1e-5 * gradient.norm()
    values = take_losses(made, lambda v: v)
    assert values.keys() == {name} and values[name] == pytest.approx(expected, rel=1e-5)
    assert take_losses(made, lambda v: v) == {name: 0.0}, "taken once"


def test_microbatches_add_up_to_the_step() -> None:
    """Two unequal microbatches: the sequence and z losses are those of one batch; the global loss
    knows, in each microbatch, the choices of the step so far."""
    made = router(**dict.fromkeys(KEYS.values(), 0.5))
    parts = [tokens(0, 3), tokens(1, 2)]
    every = torch.cat(parts)
    share = [len(x) / len(every) for x in parts]
    over_all = global_loop(made, parts[0], parts[0]) * share[0]
    over_all = over_all + global_loop(made, parts[1], every) * share[1]
    expected = [sequence_loop(made, every), over_all, z_loop(made, every)]
    (gradient,) = torch.autograd.grad(0.5 * torch.stack(expected).sum(), made.weight)
    found = gradient_of_losses(made, parts, torch.ones(len(every), 2))
    assert (found - gradient).norm() < 1e-5 * gradient.norm()
    values = take_losses(made, lambda v: v)
    assert list(values.values()) == pytest.approx([float(e.detach()) for e in expected], rel=1e-5)


def test_choices_of_other_ranks_enter_the_global_loss() -> None:
    made = router(global_aux_loss_coef=1.0)
    x, elsewhere = tokens(0), tokens(9)
    made.eval()
    theirs = torch.bincount(made(elsewhere)[0].flatten(), minlength=8)
    made.train()
    open_step(made, scope(2 * len(x), lambda counts: counts.add_(theirs)))
    made(x)[1].sum().backward()
    expected = global_loop(made, x, torch.cat([x, elsewhere])) / 2  # this rank's half of the tokens
    assert take_losses(made, lambda v: v)["global_balance"] == pytest.approx(float(expected))


def test_even_load_and_scores_give_one() -> None:
    made = router(**dict.fromkeys(KEYS.values(), 1.0), top_k=8)
    torch.nn.init.zeros_(made.weight)
    open_step(made, scope(len(tokens(0))))
    made(tokens(0))[1].sum().backward()
    values = take_losses(made, lambda v: v)
    assert list(values.values()) == pytest.approx([1.0, 1.0, math.log(8) ** 2])


def test_recomputation_counts_once() -> None:
    """Forward runs twice, backward once: value and gradient are those of a plain run."""
    results = []
    for recompute in (False, True):
        made = router(seq_aux_loss_coef=0.5, router_z_loss_coef=0.5)
        x = tokens(0).requires_grad_()
        open_step(made, scope(len(x)))
        weights = checkpoint(lambda t, m=made: m(t)[1], x, use_reentrant=False) if recompute else (
            made(x)[1]
        )  # fmt: skip
        weights.square().sum().backward()
        assert made.weight.grad is not None
        results.append((made.weight.grad, take_losses(made, lambda v: v)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_nothing_happens_outside_a_step_or_in_evaluation() -> None:
    made = router(**dict.fromkeys(KEYS.values(), 1.0))
    x = tokens(0)
    plain = made(x)[1]
    open_step(made, scope(len(x)))
    made.eval()
    assert torch.equal(made(x)[1], plain)
    made(x)[1].sum().backward()
    assert take_losses(made, lambda v: v) == dict.fromkeys(NAMES, 0.0)


def test_bf16_weights_do_not_round_the_losses() -> None:
    made = router(**dict.fromkeys(KEYS.values(), 1.0)).to(torch.bfloat16)
    made.float_bias()
    made.loss_values_3 = made.loss_values_3.float()
    x = tokens(0).bfloat16()
    open_step(made, scope(len(x)))
    made(x)[1].sum().backward()
    values = take_losses(made, lambda v: v)
    exact = router()
    exact.weight.data = made.weight.data.float()
    exact.bias_E = made.bias_E
    assert values["router_z"] == pytest.approx(float(z_loop(exact, x.float())), rel=1e-5)
    assert values["sequence_balance"] == pytest.approx(
        float(sequence_loop(exact, x.float())), rel=1e-5
    )


def test_the_losses_even_the_load() -> None:
    """Gradient descent on each balance loss alone evens a lopsided router."""
    for key in ("seq_aux_loss_coef", "global_aux_loss_coef"):
        made = router(**{key: 1.0})
        made.bias_E.zero_()
        with torch.no_grad():
            made.weight[3] += 0.4
        x = tokens(5, 40) + 0.5
        loads = []
        for _ in range(150):
            open_step(made, scope(len(x)))
            (made(x)[1] * 0).sum().backward()
            load = take_counts(made, lambda c: c)[0].double()
            loads.append(float(load.max() / load.mean()))
            assert made.weight.grad is not None
            made.weight.data -= 0.5 * made.weight.grad
            made.weight.grad = None
        assert loads[0] > 1.8 and loads[-1] < 0.75 * loads[0], (key, loads[0], loads[-1])


def test_a_config_without_coefficients_computes_no_loss() -> None:
    assert not any(
        getattr(MoEConfig(n_experts=4, top_k=2, d_expert=8), key) for key in KEYS.values()
    )
    made = router()
    open_step(made, scope(LENGTH))
    made(tokens(0, 1))[1].sum().backward()
    assert take_losses(made, lambda v: v) == {}
