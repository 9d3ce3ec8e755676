"""Against transformers: the same greedy tokens, and log-probabilities within 1e-5."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve.cache.kv_cache import KvCache
from serve.engine.batch import lay_out
from serve.engine.loading import open_export
from serve.engine.runner import ModelRunner
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, write
from tests.models.hf.transformers_peer import SEVEN, transformers

N_NEW = 13


def their_greedy(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """For each prompt the tokens that `generate` adds, and the log-probabilities from which it
    chose them, `[n, V]`."""
    model = transformers().AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    each = []
    for prompt in prompts:
        found = model.eval().generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=N_NEW, min_new_tokens=N_NEW,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        tokens = found.sequences[0, len(prompt) :].tolist()
        each.append((tokens, torch.cat(found.logits).log_softmax(-1)))
    return each


def our_greedy(
    folder: Path, prompts: list[list[int]], absorbed: bool
) -> list[tuple[list[int], Tensor]]:
    """The same for all prompts, mixed and in chunks of 9 tokens."""
    export = open_export(folder, "fp32", "cpu")
    cache = KvCache(export.model.config, 40, 8, torch.float32, torch.device("cpu"))
    runner = ModelRunner(export.model, cache, absorbed)
    tokens = [list(prompt) for prompt in prompts]
    done, logits = [0] * len(prompts), [list[Tensor]() for _ in prompts]
    while any(len(found) < N_NEW for found in logits):
        ends = [min(d + 9, len(t)) for d, t in zip(done, tokens, strict=True)]
        chunks = [
            (t[d:end], d, range(1 + 12 * b, 13 + 12 * b))
            for b, (t, d, end) in enumerate(zip(tokens, done, ends, strict=True))
        ]
        starts = [sum(len(t) for t, _, _ in chunks[: b + 1]) - 1 for b in range(len(chunks))]
        rows = runner.run(lay_out(chunks, 8, starts))
        for b, row in enumerate(rows):
            done[b] = ends[b]
            if ends[b] == len(tokens[b]):
                logits[b].append(row)
                tokens[b].append(int(row.argmax()))
    return [
        (t[len(p) :][:N_NEW], torch.stack(found[:N_NEW]).log_softmax(-1))
        for t, p, found in zip(tokens, prompts, logits, strict=True)
    ]


@pytest.mark.parametrize("name", SEVEN)
def test_generates_what_transformers_generates(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    model = FAMILIES[name]
    write(random_decoder(model), tmp_path)
    prompts = [[rng.randrange(1, 96) for _ in range(n)] for n in (5, 31)]
    expected = their_greedy(tmp_path, prompts)
    assert len({token for tokens, _ in expected for token in tokens}) > 5, "a lively model"
    for absorbed in (False, True) if model.attention.kind == "mla" else (False,):
        for (ours, scores), (theirs, their_scores) in zip(
            our_greedy(tmp_path, prompts, absorbed), expected, strict=True
        ):
            assert ours == theirs
            assert (scores - their_scores).abs().max() < 1e-5
