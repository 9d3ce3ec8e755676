"""The decoder: documents do not attend to each other, weights are tied, counts are right."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.loader import load
from configs.model import ModelConfig, RopeConfig
from models.counts import flops_per_token, parameter_counts
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.layers.rope import apply_rope, rope_tables
from tests.runs import ROOT, TINY


def build(model: ModelConfig) -> Decoder:
    decoder = Decoder(replace(model, init_std=0.3))
    initialize(decoder, decoder.config, seed=1)
    return decoder.eval()


def logits(decoder: Decoder, tokens_BL: Tensor, positions_BL: Tensor) -> Tensor:
    core = DocumentAttention(positions_BL)
    out: Tensor = decoder(tokens_BL.reshape(-1), positions_BL.reshape(-1), core)
    return out.view(*tokens_BL.shape, -1)


def test_packed_documents_equal_documents_alone() -> None:
    decoder = build(load(TINY).model)
    lengths = [5, 1, 9, 2]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = torch.randint(0, 320, positions.shape, generator=torch.Generator().manual_seed(0))
    packed = logits(decoder, tokens, positions)[0]
    start = 0
    for n in lengths:
        alone = logits(decoder, tokens[:, start : start + n], torch.arange(n)[None])[0]
        torch.testing.assert_close(packed[start : start + n], alone, rtol=1e-4, atol=1e-5)
        start += n


def test_sequences_of_a_batch_do_not_mix_and_the_past_is_fixed() -> None:
    decoder = build(load(TINY).model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 320, (3, 17), generator=generator)
    positions = torch.arange(17).expand(3, 17)
    together = logits(decoder, tokens, positions)
    alone = logits(decoder, tokens[1:2], positions[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[:, 10:] = 7
    torch.testing.assert_close(
        logits(decoder, changed, positions)[:, :10], together[:, :10], rtol=1e-4, atol=1e-5
    )


def test_rope_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16)
    products = []
    for shift in (0, 5, 1000):
        tables = [rope_tables(torch.tensor([p + shift]), RopeConfig(), 16) for p in (7, 3)]
        rotated = [apply_rope(x, t, False) for x, t in zip((q, k), tables, strict=True)]
        products.append((rotated[0] * rotated[1]).sum())
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_share_one_parameter(tied: bool) -> None:
    model = replace(load(TINY).model, tie_embeddings=tied)
    names = [name for name, _ in Decoder(model).named_parameters()]
    assert ("head.weight" in names) is not tied
    expected = 320 * 32 * (1 if tied else 2)
    assert sum(p.numel() for n, p in Decoder(model).named_parameters() if "layers" not in n) == (
        expected + 32
    )


def test_counts_by_hand() -> None:
    model = load(ROOT / "configs" / "demo.toml").model
    attention = 256 * (256 + 128 + 128 + 256) + 2 * 32
    expert, router = 3 * 256 * 256, 8 * 256
    block = attention + 2 * 256 + router + expert * (8 + 1)
    counts = parameter_counts(model)
    assert counts.total == 4096 * 256 + 4 * block + 256
    assert counts.active == counts.total - 4 * 6 * expert
    matrices = 4096 * 256 + 4 * (attention - 64 + router + expert * 3)
    scores = 12 * 4 * 256 * (256 + 1) / 2
    assert flops_per_token(model, 256) == 6 * matrices + scores
