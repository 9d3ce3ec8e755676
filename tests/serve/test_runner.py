"""The runner computes every token with the bits of training's forward pass, in every family.

Requests are divided into random chunks, mixed at random, preempted and recomputed; the logits of
every row are compared with one pass of the training core over each whole request.
"""

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from configs.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from kernels.fused_cpu.build import library
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.step_context import MicrobatchContext
from serve.cache.kv_cache import KvCache, bytes_per_token
from serve.engine.batch import lay_out
from serve.engine.fused import build_fused
from serve.engine.runner import ModelRunner, _agrees
from tests.models.families import FAMILIES
from tests.models.test_invariance import lively, logits

SERVED = [name for name in FAMILIES if not name.endswith("-mtp")]


@dataclass
class Sequence:
    tokens: list[int]
    pages: list[int]
    computed: int = 0
    rows: dict[int, Tensor] = field(default_factory=dict)


def random_sequences(rng: random.Random, cache: KvCache, lengths: list[int]) -> list[Sequence]:
    """A KV cache whose pages are in random order and full of NaN where nothing was written."""
    for tensor in cache.tensors:
        tensor[:, 1:] = torch.nan
    free = list(range(1, cache.n_pages))
    rng.shuffle(free)
    return [
        Sequence(
            [rng.randrange(90) for _ in range(length)],
            [free.pop() for _ in range(cache.pages_for(length))],
        )
        for length in lengths
    ]


def run_in_random_steps(
    rng: random.Random, runner: ModelRunner, sequences: list[Sequence], longest: int
) -> None:
    """Compute every row's logits, in steps of several chunks of up to `longest` tokens."""
    while waiting := [s for s in sequences if s.computed < len(s.tokens)]:
        picked = rng.sample(waiting, rng.randint(1, len(waiting)))
        chunks, owners = [], []
        for s in picked:
            if s.computed and rng.random() < 0.05:
                s.computed = 0  # preempted
            n = rng.choice([1, 2, longest])
            end = min(s.computed + n, len(s.tokens))
            chunks.append((s.tokens[s.computed : end], s.computed, s.pages))
            owners += [(s, position) for position in range(s.computed, end)]
            s.computed = end
        batch = lay_out(chunks, runner.cache.page_size, range(len(owners)))
        for (s, position), row in zip(owners, runner.run(batch), strict=True):
            if position in s.rows:
                assert torch.equal(s.rows[position], row), "recomputed, and different"
            s.rows[position] = row


def make_runner(
    decoder: Decoder, dtype: torch.dtype, page_size: int, absorbed: bool = False
) -> ModelRunner:
    cache = KvCache(decoder.config, 600 // page_size + 8, page_size, dtype, torch.device("cpu"))
    return ModelRunner(decoder, cache, absorbed)


@pytest.mark.parametrize(
    ("name", "dtype", "page_size"),
    [  # by default every two values of different parameters
        pytest.param(name, dtype, page_size, marks=[pytest.mark.slow] * ((i + j + k) % 2))
        for i, name in enumerate(SERVED)
        for j, dtype in enumerate([torch.float32, torch.bfloat16])
        for k, page_size in enumerate([5, 16])
    ],
)
def test_bits_of_training(name: str, dtype: torch.dtype, page_size: int) -> None:
    rng = random.Random(f"{name} {page_size}")
    decoder = lively(FAMILIES[name], dtype)
    runner = make_runner(decoder, dtype, page_size)
    sequences = random_sequences(rng, runner.cache, [1, 20, 39, 171])
    run_in_random_steps(rng, runner, sequences, 50)
    for s in sequences:
        padded = torch.tensor([s.tokens + [0] * (-len(s.tokens) % 8)])  # training's batch
        expected = logits(decoder, padded)[0]
        for position, row in s.rows.items():
            assert torch.equal(row, expected[position].float()), (len(s.tokens), position)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_absorbed_latents(name: str) -> None:
    """The same numbers except for rounding; and their bits do not depend on the batch."""
    decoder = lively(FAMILIES[name], torch.float32)
    seen = []
    for seed in range(2):
        rng = random.Random(seed)
        runner = make_runner(decoder, torch.float32, 16, absorbed=True)
        sequences = random_sequences(random.Random(0), runner.cache, [5, 40, 131])
        run_in_random_steps(rng, runner, sequences, 40)
        seen.append([torch.stack([s.rows[p] for p in range(len(s.tokens))]) for s in sequences])
    for first, second, s in zip(*seen, sequences, strict=True):
        assert torch.equal(first, second)
        padded = torch.tensor([s.tokens + [0] * (-len(s.tokens) % 8)])
        expected = logits(decoder, padded)[0][: len(s.tokens)]
        assert (first - expected).norm() < 1e-5 * expected.norm()
        assert not torch.equal(first, expected), "the order of sums is another"


def test_bytes_of_latents() -> None:
    model = FAMILIES["deepseek-v3"]
    a = model.attention
    width = a.kv_lora_rank + a.qk_rope_head_dim
    assert bytes_per_token(model, torch.bfloat16) == model.n_layers * width * 2
    cache = KvCache(model, 3, 16, torch.bfloat16, torch.device("cpu"))
    assert cache.n_bytes == 3 * 16 * bytes_per_token(model, torch.bfloat16)
    assert f"{2 * width} bytes of latents per token and layer" in cache.describe()


def assert_experts_of_training(decoder: Decoder, dtype: torch.dtype, fused: bool) -> None:
    """The recorded experts of every row of a step equal training's, and logits are the same without
    recording."""
    runner = make_runner(decoder, dtype, 16)
    assert (runner.fused is not None) == fused
    s, other = random_sequences(random.Random(0), runner.cache, [43, 1])
    batch = lay_out([(s.tokens, 0, s.pages), (other.tokens, 0, other.pages)], 16, range(44))
    found: list[Tensor] = []
    row_logits = runner.run(batch, routing=found.append)
    context = MicrobatchContext.recording(decoder.config)
    positions = torch.arange(48)
    with torch.no_grad():
        decoder(
            torch.tensor([*s.tokens, *[0] * 5]), positions, DocumentAttention(positions[None]),
            context=context,
        )  # fmt: skip
    (ids_LTK,) = found
    assert ids_LTK.shape[1] == 44
    assert torch.equal(ids_LTK[:, :43], context.routed_experts()[:, :43])
    assert torch.equal(row_logits, runner.run(batch))


@pytest.mark.parametrize("name", SERVED)
def test_routed_experts(name: str) -> None:
    assert_experts_of_training(lively(FAMILIES[name], torch.float32), torch.float32, False)


@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_pages_outside_the_window_are_not_read(name: str) -> None:
    """Local layers of a request beyond 128 + window tokens never touch its first page."""
    model = FAMILIES[name]
    decoder = lively(model, torch.float32)
    runner = make_runner(decoder, torch.float32, 16)
    rng = random.Random(0)
    (s,) = random_sequences(rng, runner.cache, [300])
    runner.run(lay_out([(s.tokens[:-1], 0, s.pages)], 16, []))
    for layer in range(model.n_layers):
        if not model.attention.is_full(layer):
            runner.cache.keys(layer)[s.pages[0]] = torch.nan
            runner.cache.values(layer)[s.pages[0]] = torch.nan
    row = runner.run(lay_out([(s.tokens[-1:], 299, s.pages)], 16, [0]))
    expected = logits(decoder, torch.tensor([s.tokens + [0] * 4]))[0, 299]
    assert torch.equal(row[0], expected)


def test_scored_rows_have_the_same_bits() -> None:
    decoder = lively(FAMILIES["qwen3"], torch.bfloat16)
    runner = make_runner(decoder, torch.bfloat16, 16)
    rng = random.Random(0)
    (s,) = random_sequences(rng, runner.cache, [150])
    batch = lay_out([(s.tokens, 0, s.pages)], 16, range(150))
    found: dict[int, Tensor] = {}
    scored = torch.arange(3, 141)
    direct = runner.run(
        type(batch)(**{**vars(batch), "scored_rows": scored}),
        lambda first, rows: found.update({first + i: row for i, row in enumerate(rows)}),
    )
    assert sorted(found) == list(range(138))
    assert all(torch.equal(found[i], direct[i + 3]) for i in found)


WIDE = {
    "qwen3": ModelConfig(
        vocab_size=96, d_model=64, n_layers=3, n_dense_layers=1, d_ff=96, tie_embeddings=False,
        attention=AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=16, qk_norm="rms"),
        moe=MoEConfig(n_experts=20, top_k=3, d_expert=32, route_scale=1.3),
    ),
    "glm4": ModelConfig(
        vocab_size=90, d_model=48, n_layers=3, n_dense_layers=1, d_ff=64,
        attention=AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=32, qk_norm="rms"),
        moe=MoEConfig(n_experts=8, top_k=2, d_expert=64, n_shared_experts=2, score_func="sigmoid",
                n_groups=4, top_groups=2, route_scale=1.7, bias_update_rate=0.01),
    ),
    "sigmoid": ModelConfig(
        vocab_size=96, d_model=80, n_layers=2, tie_embeddings=False,
        attention=AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=16, local="window",
        local_size=21,
                            full_every=2),
        moe=MoEConfig(n_experts=6, top_k=5, d_expert=32, score_func="sigmoid", norm_top_k=False),
    ),
    "mixtral": ModelConfig(
        vocab_size=96, d_model=64, n_layers=2, tie_embeddings=False,
        attention=AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=48, local="chunk",
        local_size=37), rope=RopeConfig(interleaved=True), moe=MoEConfig(n_experts=5, top_k=1,
        d_expert=96, norm_top_k=False),
    ),
}  # fmt: skip
"""Models with widths that `kernels.fused_cpu` supports."""


@pytest.mark.skipif(library() is None, reason="needs AVX512-BF16 and a C++ compiler")
@pytest.mark.parametrize("name", WIDE)
def test_bits_of_training_in_cpp(name: str) -> None:
    rng = random.Random(name)
    decoder = lively(WIDE[name], torch.bfloat16)
    runner = make_runner(decoder, torch.bfloat16, rng.choice([16, 32]))
    assert runner.fused is not None, "refused, or other bits"
    sequences = random_sequences(rng, runner.cache, [1, 18, 70, 171])
    run_in_random_steps(rng, runner, sequences, 50)
    for s in sequences:
        expected = logits(decoder, torch.tensor([s.tokens + [0] * (-len(s.tokens) % 8)]))[0]
        for position, row in s.rows.items():
            assert torch.equal(row, expected[position].float()), (len(s.tokens), position)


@pytest.mark.skipif(library() is None, reason="needs AVX512-BF16 and a C++ compiler")
@pytest.mark.parametrize("name", WIDE)
def test_routed_experts_in_cpp(name: str) -> None:
    """Computed by the C++ kernel and, in groups, by the training module."""
    assert_experts_of_training(lively(WIDE[name], torch.bfloat16), torch.bfloat16, True)


@pytest.mark.skipif(library() is None, reason="needs AVX512-BF16 and a C++ compiler")
def test_other_bits_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """A library that sums in another order is not used."""
    decoder = lively(WIDE["qwen3"], torch.bfloat16)
    cache = make_runner(decoder, torch.bfloat16, 16).cache
    fused = build_fused(decoder, cache)
    assert fused is not None
    fused.layers[1].scale *= 1 + 1e-4
    assert not _agrees(fused, decoder)
    assert "other bits than training" in caplog.text
