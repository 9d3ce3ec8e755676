"""AdamW with bf16 moments equals AdamW in fp64 whose moments are rounded after every step.

Every step is compared starting from the state that the optimizer itself stored before. Its
arithmetic is fp32, so a moment within 2^-24 of the midpoint of two bf16 numbers may be rounded to
the other one: all but one in a thousand must be equal, the rest adjacent. Weights: 1e-6 of the
update.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from configs.errors import UserError
from configs.loader import from_dict
from train.optim.bf16_moments import Bf16MomentsAdamW

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def rounded_adamw(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step in fp64, with moments in bf16 before and after."""
    w, g, m, v = w.double(), g.double(), m.double(), v.double()
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
    w = w * (1 - LR * DECAY)
    root = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
    return w - LR * m / (1 - BETAS[0] ** step) / root, m.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("shape", [(257, 129), (7,), (0, 4)], ids=str)
def test_every_step_is_that_of_fp64_with_rounded_moments(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = Bf16MomentsAdamW(
        [weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
    m = v = torch.zeros(shape, dtype=torch.bfloat16)
    for step in range(1, 21):
        scale = 10.0 ** torch.randint(-6, 3, shape, generator=generator)
        weight.grad = torch.randn(shape, generator=generator) * scale
        before = weight.detach().clone()
        expected, m, v = rounded_adamw(before, weight.grad, m, v, step)
        optimizer.step()
        assert weight.dtype == torch.float32
        update = (expected - before).norm()
        assert (weight.detach().double() - expected).norm() <= 1e-6 * update + 1e-7 * before.norm()
        state = optimizer.state[weight]
        for ours, right in ((state["exp_avg"], m), (state["exp_avg_sq"], v)):
            assert ours.dtype == torch.bfloat16
            steps_apart = (ours.view(torch.int16).int() - right.view(torch.int16).int()).abs()
            assert (steps_apart > 0).sum() <= 1e-3 * right.numel()
            assert not right.numel() or steps_apart.max() <= 1
        m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        assert int(state["step"]) == step


def test_it_follows_fp32_moments() -> None:
    """On a quadratic with noise, where the moments matter."""
    ends = []
    for kind in (torch.optim.AdamW, Bf16MomentsAdamW):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 64, generator=generator))
        target = torch.randn(64, 64, generator=generator)
        optimizer = kind([weight], lr=1e-2, betas=BETAS, weight_decay=0.0, fused=True)
        for _ in range(300):
            noise = 0.1 * torch.randn(64, 64, generator=generator)
            weight.grad = weight.detach() - target + noise
            optimizer.step()
        ends.append(float((weight.detach() - target).norm() / target.norm()))
    assert ends[0] < 0.2 and abs(ends[1] - ends[0]) < 0.05 * ends[0]


@pytest.mark.parametrize("key", ["beta1", "beta2"])
def test_a_mean_too_slow_for_bf16_is_refused(
    key: str, settings: Callable[..., dict[str, object]]
) -> None:
    from_dict(settings(beta=0.999, key=key, moments="fp32"), "here")
    from_dict(settings(beta=0.98, key=key, moments="bf16"), "here")
    with pytest.raises(UserError, match=f"moments = 'bf16'.*{key} = 0.999.*at most 0.98"):
        from_dict(settings(beta=0.999, key=key, moments="bf16"), "here")


@pytest.fixture
def settings() -> Callable[..., dict[str, object]]:
    def made(beta: float, key: str, moments: str) -> dict[str, object]:
        return {
            "run": {"dir": "unused"},
            "model": {"vocab_size": 8, "d_model": 8, "n_layers": 1,
                      "attention": {"n_heads": 1, "head_dim": 8},
                      "moe": {"n_experts": 2, "top_k": 2, "d_expert": 8}},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            "optimizer": {"lr": 1e-3, key: beta},
            "precision": {"moments": moments},
        }  # fmt: skip

    return made
