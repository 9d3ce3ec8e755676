"""An export in FP8 is served as the model that its blocks mean."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.fp8_blocks import fp8_plan
from models.init import initialize
from serve.engine.engine import Engine, EngineOptions
from serve.engine.loading import open_export
from serve.engine.request import SamplingParams
from tests.models.test_fp8_blocks import dequantised, write_fp8
from tests.serve.conftest import CONFIG, make_tokenizer

WIDE = replace(CONFIG, d_model=128, moe=replace(CONFIG.moe, d_expert=128))


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], n: int) -> list[int]:
    """By full forward passes: no cache, no batch."""
    tokens = list(prompt)
    for _ in range(n):
        positions = torch.arange(len(tokens))
        core = DocumentAttention(positions[None])
        tokens.append(int(model(torch.tensor(tokens), positions, core)[-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    """The reference is dequantised by plain loops, not by way of the folder."""
    given = Decoder(WIDE)
    initialize(given, WIDE, seed=0)
    write_fp8(given.eval(), tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert fp8_plan(WIDE).share > 0.5
    prompts = [[1], [5, 17, 250, 3], list(range(40, 61))]
    export = open_export(tmp_path, "fp32", "cpu")
    served = [
        Engine(export, EngineOptions(kv_tokens=4096)).generate(
            [prompt], SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        )[0]
        for prompt in prompts
    ]
    meant = dequantised(given)
    expected = [greedy(meant, prompt, 24) for prompt in prompts]
    assert [done.tokens for done in served] == expected
    assert expected != [greedy(given, prompt, 24) for prompt in prompts], "quantised it was"
    assert open_export(tmp_path, "auto", "cpu").dtype == torch.bfloat16
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["quantization_config"]["weight_block_size"] == [128, 128]
