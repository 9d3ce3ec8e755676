"""Multi-token prediction against the equations of DeepSeek-V3, document by document.

Tolerance 1e-5 of the reference's norm: fp32, other order of summation.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.loader import load
from configs.model import ModelConfig
from kernels.layers.cross_entropy import IGNORE
from models.counts import flops_per_token, parameter_counts
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.layers.rope import rope_tables
from models.mtp import MtpModule
from tests.models.families import DEEPSEEK_V3_MTP
from tests.runs import ROOT, TINY
from tests.step_contexts import counts_of, model_step
from train.data.batches import Batch, sequence_batch
from train.dataset.sequences import sequences_of
from train.loss import count_tokens, look_ahead, loss_sum, loss_sums


def build(model: ModelConfig) -> Decoder:
    decoder = Decoder(replace(model, init_std=0.2))
    initialize(decoder, decoder.config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return decoder


def tiny(depth: int) -> ModelConfig:
    return replace(load(TINY).model, mtp_depth=depth)


def packed(model: ModelConfig, lengths: list[list[int]]) -> tuple[Batch, list[Tensor]]:
    """Sequences of documents of the given lengths: the batch, and every document with the token
    that follows it (which is also the last target of the last document of a sequence)."""
    rng, rows, documents = np.random.default_rng(0), [], []
    for row in lengths:
        parts = [np.r_[0, rng.integers(1, model.vocab_size, n - 1)] for n in row]
        rows.append(np.concatenate(parts))
        documents += [torch.from_numpy(np.r_[part, 0]) for part in parts]
    flat = np.r_[np.concatenate(rows), 0].astype(np.uint16)
    batch = sequence_batch(sequences_of(flat, len(rows[0]), eot=0), np.arange(len(rows)))
    return batch, documents


def document_losses(decoder: Decoder, document: Tensor, depth: int) -> list[Tensor]:
    """Equations 21-25 for one document alone, restricted to the positions that have targets at each
    depth."""
    tokens, n = document, len(document) - 1
    positions = torch.arange(n)
    core = DocumentAttention(positions[None])
    states: list[Tensor] = []
    decoder(tokens[:n], positions, core, lambda x, head: states.append(x))
    hidden, losses = states[0], []
    head = (decoder.embed if decoder.head is None else decoder.head).weight
    losses.append(F.cross_entropy(hidden @ head.T, tokens[1:], reduction="sum"))
    for k in range(1, depth + 1):
        rows = n - k
        if rows <= 0:
            losses.append(torch.zeros(()))
            continue
        module, config = decoder.mtp[k - 1], decoder.config
        assert isinstance(module, MtpModule)
        here = positions[:rows]
        embedded = module.enorm(decoder.embed(tokens[k : k + rows]))
        x = F.linear(torch.cat([embedded, module.hnorm(hidden[:rows])], 1), module.eh_proj.weight)
        tables = rope_tables(here, config.rope, config.attention.rope_dim)
        core = DocumentAttention(here[None])
        x = x + module.attention(module.attention_norm(x), here, tables, core)
        x = x + module.ffn(module.ffn_norm(x))
        hidden = module.norm(x)
        losses.append(F.cross_entropy(hidden @ head.T, tokens[k + 1 :], reduction="sum"))
    return losses


@pytest.mark.parametrize("model", [tiny(2), DEEPSEEK_V3_MTP, tiny(1)], ids=["gqa", "mla", "one"])
def test_packed_losses_and_gradients_equal_documents_alone(model: ModelConfig) -> None:
    decoder, depth = build(model), model.mtp_depth
    batch, documents = packed(model, [[5, 1, 9, 2, 4], [21], [1, 1, 2, 3, 14]])
    ours = loss_sums(decoder, batch, depth)
    # the documents contain every target: the last of each sequence is followed by a 0 in both
    theirs = torch.stack(
        [torch.stack(document_losses(decoder, d, depth)) for d in documents]
    ).sum(0)  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    weights = torch.tensor([1.0, 0.7, 0.4])[: depth + 1]
    parameters = dict(decoder.named_parameters())
    for name, a, b in zip(
        parameters,
        torch.autograd.grad((ours * weights).sum(), list(parameters.values())),
        torch.autograd.grad((theirs * weights).sum(), list(parameters.values())),
        strict=True,
    ):
        assert b.norm() > 0 and (a - b).norm() < 1e-5 * b.norm(), name
    assert ours[0] == loss_sum(decoder, batch)


@pytest.mark.parametrize("depth", [1, 2, 5, 30])
def test_look_ahead_equals_loops(depth: int) -> None:
    batch, _ = packed(tiny(0), [[5, 1, 9, 2, 4], [21]])
    tokens, targets = look_ahead(batch, depth)
    size, length = 42, 21
    document = (batch.positions_T == 0).cumsum(0)
    count = 0
    for i in range(size):
        j = i + depth
        if j < size and i // length == j // length and document[i] == document[j]:
            assert tokens[i] == batch.tokens_T[j] and targets[i] == batch.targets_T[j]
            count += 1
        else:
            assert tokens[i] == 0 and targets[i] == IGNORE
    counts = count_tokens([batch, batch], depth)
    assert counts[:2].tolist() == [2 * size, 2 * size] and counts[1 + depth] == 2 * count


def test_what_has_no_target_changes_no_loss() -> None:
    """Changing the tokens at positions without a successor changes no loss."""
    decoder = build(tiny(2))
    batch, _ = packed(decoder.config, [[5, 1, 9, 6]])
    ahead = [look_ahead(batch, k) for k in (1, 2)]

    def losses(filler: int) -> list[float]:
        found: list[float] = []

        def output(targets: Tensor):  # type: ignore[no-untyped-def]
            return lambda x, head: found.append(
                float(F.cross_entropy(x @ head.T, targets, ignore_index=IGNORE, reduction="sum"))
            )

        modules = [
            (torch.where(t == IGNORE, filler, successors), output(t)) for successors, t in ahead
        ]
        with torch.no_grad():
            decoder(batch.tokens_T, batch.positions_T, batch.core, output(batch.targets_T), modules)
        return found

    assert losses(0) == pytest.approx(losses(77), rel=1e-6)


def test_without_a_look_ahead_the_modules_do_not_run() -> None:
    decoder, plain = build(tiny(1)), build(tiny(0))
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if "mtp" not in k})
    batch, _ = packed(decoder.config, [[5, 16]])
    step = model_step(decoder.config, seq_len=21, tokens=21)
    with torch.no_grad():
        ours = loss_sum(decoder, batch, context=step.microbatch())
        assert ours == loss_sum(plain, batch)
        assert counts_of(step).sum(1).tolist() == [42, 42, 0], "two MoE layers, and the module's"
        loss_sums(decoder, batch, 1, context=step.microbatch())
    assert counts_of(step).sum(1).tolist() == [84, 84, 42]


def test_counts_and_flops_with_modules() -> None:
    with_mtp, without = tiny(2), tiny(0)
    own = sum(p.numel() for p in Decoder(with_mtp).mtp.parameters())
    counts, plain = parameter_counts(with_mtp), parameter_counts(without)
    assert counts.mtp == own and plain.mtp == 0
    assert (counts.total, counts.active) == (plain.total, plain.active)
    assert counts.experts == plain.experts * 2  # two layers of the model, two modules
    assert sum(every for every, _ in counts.layers) == own + sum(e for e, _ in plain.layers)
    d, vocab, top_k = 32, 320, 2
    attention = d * (32 + 16 + 16 + 32)
    moe = 8 * d + 3 * 16 * d * (top_k + 1)
    scores = 6 * 4 * (8 + 8) * (32 + 1) / 2
    module = 6 * (2 * d * d + attention + moe + vocab * d) + scores
    assert flops_per_token(with_mtp, 32) == flops_per_token(without, 32) + 2 * module


def test_deepseek_v3_costs_260_gflop_per_token_with_its_module() -> None:
    model = load(ROOT / "configs" / "deepseek_v3_671b.toml").model
    assert model.mtp_depth == 1
    assert flops_per_token(model, 4096) / 1e9 == pytest.approx(260.0, rel=5e-3)
    assert flops_per_token(replace(model, mtp_depth=0), 4096) / 1e9 == pytest.approx(
        249.8, rel=5e-3
    )
    counts = parameter_counts(model)
    assert counts.total / 1e9 == pytest.approx(671, abs=0.5)
    assert counts.mtp / 1e9 == pytest.approx(11.5, abs=0.12)  # README of the weights
    # its files contain embedding and head of the module as copies: 685B
    assert (counts.total + counts.mtp + 2 * counts.embedding) / 1e9 == pytest.approx(685, abs=0.6)
