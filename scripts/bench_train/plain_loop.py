"""`python -m scripts.bench_train.plain_loop STEPS CORPUS DTYPE`: the baseline, a straightforward
MoE loop.

One process, all cores, autocast, no parallelism, no checkpoints: 8.4 M parameters, 4 layers of
width 256, 8 heads, 8 experts of width 256 with top-2 softmax routing and an auxiliary loss.
`scripts.bench_train` runs it against the trainer with the same model, batch and sequence. It shares
no code with the project, so that it is an independent baseline. Prints one JSON line per step.

CORPUS: a .npy of token ids (vocabulary 4096). DTYPE: bfloat16, or float32 without autocast.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LAYERS, HEADS, EXPERTS, TOP_K, HIDDEN = 4096, 256, 4, 8, 8, 2, 256
LENGTH, BATCH = 256, 8


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * HIDDEN) * 0.02)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x.float()).softmax(-1)
        weights, chosen = scores.topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=EXPERTS)
        ends = counts.cumsum(0).to(torch.int32)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        rows = x[order // TOP_K].to(dtype)
        gate, up = torch._grouped_mm(rows, self.w1.to(dtype), offs=ends).chunk(2, -1)
        hidden = (F.silu(gate) * up).contiguous()
        out = torch._grouped_mm(hidden, self.w2.to(dtype), offs=ends).float()
        out = out * weights.flatten()[order, None]
        balance = (counts.float() / counts.sum() * scores.mean(0)).sum() * EXPERTS
        return torch.zeros_like(x, dtype=torch.float).index_add(0, order // TOP_K, out), balance


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.moe = MoE()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        y, balance = self.moe(self.norm2(x).view(-1, WIDTH))
        return x + y.view(batch, length, WIDTH), balance


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        half = WIDTH // HEADS // 2
        angles = torch.outer(
            torch.arange(tokens.shape[1]).float(), 1e4 ** (-torch.arange(half) / half)
        )
        balance = torch.zeros(())
        for block in self.blocks:
            x, extra = block(x, angles.cos(), angles.sin())
            balance = balance + extra
        return F.linear(self.norm(x), self.embed.weight), balance


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, low * sin + high * cos], -1)


def train(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], length: int, steps: int, corpus: str,
    dtype: str,
) -> None:  # fmt: skip
    """Train for `steps` steps and print loss, tokens/s and the peak of memory of each.

    Args:
        model: Its parameters are trained by fused AdamW.
        loss_of: The loss of windows of the corpus `[BATCH, length]`.
        length: Tokens of a window.
        steps: Number of steps.
        corpus: A .npy of token ids.
        dtype: `bfloat16` of autocast, or `float32` without it.
    """
    tokens = torch.from_numpy(np.load(corpus, allow_pickle=False).astype(np.int64))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(1, steps + 1):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * step / steps
        starts = torch.randint(0, len(tokens) - length, (BATCH,))
        window = torch.stack([tokens[s : s + length] for s in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speed = BATCH * LENGTH / (time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        record = {"step": step, "loss": loss.item(), "tokens_per_s": speed, "memory_gib": peak}
        print(json.dumps(record), flush=True)


def main(steps: int, corpus: str, dtype: str) -> None:
    """Train the model of this file; its printed loss includes the balance loss."""
    torch.manual_seed(0)
    model = Model()

    def loss_of(window: Tensor) -> Tensor:
        logits, balance = model(window[:, :-1])
        loss = F.cross_entropy(logits.float().view(-1, VOCAB), window[:, 1:].reshape(-1))
        return loss + 0.01 * balance

    train(model, loss_of, LENGTH + 1, steps, corpus, dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
