"""The routers' auxiliary losses against plain loops: values, gradients, and when they are computed.

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
from models.balance import mean_losses
from models.router import Router
from models.step_context import AUXILIARY_LOSSES, StepContext
from tests.runs import TINY
from tests.step_contexts import layer_step, next_microbatch, unchanged

LENGTH, SEQUENCES, WIDTH = 7, 3, 12
COEFFICIENTS = ("seq_aux_loss_coef", "global_aux_loss_coef", "router_z_loss_coef")
KEYS = dict(zip(AUXILIARY_LOSSES, COEFFICIENTS, strict=True))


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


def step_of(
    made: Router, n_tokens: int, reduce: Callable[[Tensor], Tensor] = unchanged
) -> StepContext:
    return layer_step(made.config.n_experts, LENGTH, n_tokens, reduce)


def losses_of(made: Router, step: StepContext) -> dict[str, float]:
    return mean_losses(made.config, step, unchanged)


def scores_of(made: Router, x: Tensor) -> list[Tensor]:
    """Scores of every token, computed from its logits one by one."""
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
    """arXiv:2501.11873 with f over the choices of all tokens in `seen`, and the mean of P over
    `x`."""
    moe = made.config
    ids = made(seen)[0].flatten().tolist()
    scores, total = scores_of(made, x), torch.zeros(())
    for i in range(moe.n_experts):
        p = sum((s[i] / s.sum() for s in scores), torch.zeros(())) / len(x)
        total = total + moe.n_experts * ids.count(i) / len(ids) * p
    return total


def z_loop(made: Router, x: Tensor) -> Tensor:
    """ST-MoE, eq. 5."""
    squares = [(made.weight @ row).exp().sum().log() ** 2 for row in x]
    return torch.stack(squares).mean()


def gradient_of_losses(
    made: Router, batches: list[Tensor], main: Tensor
) -> tuple[Tensor, StepContext]:
    """Gradient of the router's weight from the auxiliary losses alone (the difference with and
    without them), and the step with them."""
    step = step_of(made, sum(map(len, batches)))
    grads: list[Tensor] = []
    for on in (True, False):
        made.weight.grad = None
        for x in batches:
            layer = next_microbatch(step) if on else None
            (made(x, layer)[1] * main[: len(x)]).sum().backward()
        assert made.weight.grad is not None
        grads.append(made.weight.grad.clone())
    return grads[0] - grads[1], step


SETTINGS: list[dict[str, object]] = [
    {},
    {"score_func": "softmax", "norm_top_k": False},
    {"n_groups": 4, "top_groups": 2},
    {"top_k": 1},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("name", AUXILIARY_LOSSES)
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
    found, step = gradient_of_losses(made, [x], main)
    assert (found - gradient).norm() < 1e-5 * gradient.norm()
    values = losses_of(made, step)
    assert values.keys() == {name} and values[name] == pytest.approx(expected, rel=1e-5)
    assert losses_of(made, step_of(made, len(x))) == {name: 0.0}, "a step begins at zero"


def test_microbatches_add_up_to_the_step() -> None:
    """Two unequal microbatches: the sequence and z losses equal those of one batch; in each
    microbatch, the global loss uses the choices of the step so far."""
    made = router(**dict.fromkeys(KEYS.values(), 0.5))
    parts = [tokens(0, 3), tokens(1, 2)]
    every = torch.cat(parts)
    share = [len(x) / len(every) for x in parts]
    over_all = global_loop(made, parts[0], parts[0]) * share[0]
    over_all = over_all + global_loop(made, parts[1], every) * share[1]
    expected = [sequence_loop(made, every), over_all, z_loop(made, every)]
    (gradient,) = torch.autograd.grad(0.5 * torch.stack(expected).sum(), made.weight)
    found, step = gradient_of_losses(made, parts, torch.ones(len(every), 2))
    assert (found - gradient).norm() < 1e-5 * gradient.norm()
    values = losses_of(made, step)
    assert list(values.values()) == pytest.approx([float(e.detach()) for e in expected], rel=1e-5)


def test_choices_of_other_ranks_enter_the_global_loss() -> None:
    made = router(global_aux_loss_coef=1.0)
    x, elsewhere = tokens(0), tokens(9)
    theirs = torch.bincount(made(elsewhere)[0].flatten(), minlength=8)
    step = step_of(made, 2 * len(x), lambda counts: counts.add_(theirs))
    made(x, next_microbatch(step))[1].sum().backward()
    expected = global_loop(made, x, torch.cat([x, elsewhere])) / 2  # this rank's half of the tokens
    assert losses_of(made, step)["global_balance"] == pytest.approx(float(expected.detach()))
    own = step.moe_layers[0].counts_E
    assert own.sum() == len(x) * made.config.top_k, "the choices of this rank alone"


def test_even_load_and_scores_give_one() -> None:
    made = router(**dict.fromkeys(KEYS.values(), 1.0), top_k=8)
    torch.nn.init.zeros_(made.weight)
    step = step_of(made, len(tokens(0)))
    made(tokens(0), next_microbatch(step))[1].sum().backward()
    values = losses_of(made, step)
    assert list(values.values()) == pytest.approx([1.0, 1.0, math.log(8) ** 2])


def test_recomputation_counts_once() -> None:
    """Forward runs twice, backward once: value, gradient and counts equal those of a plain run."""
    results = []
    for recompute in (False, True):
        made = router(**dict.fromkeys(KEYS.values(), 0.5))
        x = tokens(0).requires_grad_()
        step = step_of(made, len(x))
        layer = next_microbatch(step)
        weights = (
            checkpoint(lambda t, m=made, c=layer: m(t, c)[1], x, use_reentrant=False)
            if recompute
            else made(x, layer)[1]
        )
        weights.square().sum().backward()
        assert made.weight.grad is not None
        results.append((made.weight.grad, losses_of(made, step), step.moe_layers[0].counts_E))
    (gradient, values, counts), again = results
    assert torch.equal(gradient, again[0]) and values == again[1]
    assert torch.equal(counts, again[2])


def test_nothing_happens_outside_a_step() -> None:
    """Without a context the weights' gradient contains no loss, in training mode or not; with a
    context the weights are the same and only their gradient differs."""
    made = router(**dict.fromkeys(KEYS.values(), 1.0))
    bare, x = router(), tokens(0)
    for mode in (True, False):
        for one in (made, bare):
            one.train(mode).zero_grad()
        made(x)[1].square().sum().backward()
        bare(x)[1].square().sum().backward()
        assert made.weight.grad is not None and bare.weight.grad is not None
        assert torch.equal(made.weight.grad, bare.weight.grad)
    step = step_of(made, len(x))
    weights = made(x, next_microbatch(step))[1]
    assert torch.equal(weights, made(x)[1])
    assert losses_of(made, step) == dict.fromkeys(AUXILIARY_LOSSES, 0.0), "added in backward"
    made.zero_grad()
    weights.square().sum().backward()
    assert not torch.equal(made.weight.grad, bare.weight.grad)  # type: ignore[arg-type]
    assert all(losses_of(made, step).values())


def test_bf16_weights_do_not_round_the_losses() -> None:
    made = router(**dict.fromkeys(KEYS.values(), 1.0)).to(torch.bfloat16)
    made.float_bias()
    x = tokens(0).bfloat16()
    step = step_of(made, len(x))
    made(x, next_microbatch(step))[1].sum().backward()
    values = losses_of(made, step)
    exact = router()
    exact.weight.data = made.weight.data.float()
    exact.bias_E = made.bias_E
    assert values["router_z"] == pytest.approx(float(z_loop(exact, x.float()).detach()), rel=1e-5)
    assert values["sequence_balance"] == pytest.approx(
        float(sequence_loop(exact, x.float()).detach()), rel=1e-5
    )


def test_the_losses_even_the_load() -> None:
    """Gradient descent on each balance loss alone balances a skewed router."""
    for key in ("seq_aux_loss_coef", "global_aux_loss_coef"):
        made = router(**{key: 1.0})
        made.bias_E.zero_()
        with torch.no_grad():
            made.weight[3] += 0.4
        x = tokens(5, 40) + 0.5
        loads = []
        for _ in range(150):
            step = step_of(made, len(x))
            (made(x, next_microbatch(step))[1] * 0).sum().backward()
            load = step.moe_layers[0].counts_E.double()
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
    step = step_of(made, LENGTH)
    made(tokens(0, 1), next_microbatch(step))[1].sum().backward()
    assert losses_of(made, step) == {}
    assert step.moe_layers[0].losses_3.tolist() == [0.0, 0.0, 0.0]
