"""An FP8 export is served with the weights to which its blocks dequantize."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from configs.precision import FP8Config
from kernels.gemm.linear_fp8 import Fp8Weight
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.fp8 import apply_fp8, fp8_modules
from models.hf.fp8_blocks import fp8_plan
from models.init import initialize
from models.layers.linear import Fp8Linear, as_matrices
from models.router import routers
from serve.cache.kv_cache import KvCache
from serve.engine.attention import plain_weight
from serve.engine.loading import load_update, open_export
from serve.engine.request import SamplingParams
from serve.engine.runner import ModelRunner
from serve.frontend.engine import Engine, EngineOptions
from tests.models.families import FAMILIES
from tests.models.hf.test_fp8_blocks import dequantised, write_fp8
from tests.models.test_invariance import logits
from tests.serve.conftest import CONFIG, TOKENS, make_tokenizer
from tests.serve.test_runner import random_sequences, run_in_random_steps

WIDE = replace(CONFIG, d_model=128, moe=replace(CONFIG.moe, d_expert=128))


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens by full forward passes: no cache, no batch."""
    tokens = list(prompt)
    for _ in range(n):
        positions = torch.arange(len(tokens))
        core = DocumentAttention(positions[None])
        logits_V = model(torch.tensor(tokens), positions, core)[-1]
        tokens.append(int(logits_V[:TOKENS].argmax()))  # the others are padding
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    """The reference is dequantized by plain loops, not read from the folder."""
    given = Decoder(WIDE)
    initialize(given, WIDE, seed=0)
    write_fp8(given.eval(), tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert fp8_plan(WIDE).share > 0.5
    prompts = [[1], [5, 17, 250, 3], list(range(40, 61))]
    export = open_export(tmp_path, "fp32", "cpu")
    served = [
        Engine(export, EngineOptions(kv_tokens=4096)).generate(
            [prompt], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        )[0]
        for prompt in prompts
    ]
    meant = dequantised(given)
    expected = [greedy(meant, prompt, 12) for prompt in prompts]
    assert [done.tokens for done in served] == expected
    assert expected != [greedy(given, prompt, 12) for prompt in prompts], "quantised it was"
    assert open_export(tmp_path, "auto", "cpu").dtype == torch.bfloat16
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["quantization_config"]["weight_block_size"] == [128, 128]


def test_bits_of_training_in_fp8(tmp_path: Path) -> None:
    """Weights stay in FP8, and logits equal those of the trainer's FP8 modules, bit by bit."""
    model = replace(WIDE, attention=replace(WIDE.attention, head_dim=64))
    given = Decoder(model)
    initialize(given, model, seed=0)
    write_fp8(given.eval(), tmp_path)
    export = open_export(tmp_path, "auto", "cpu")
    kept = fp8_modules(export.model)
    assert len(kept) == 2 * 6  # four projections, experts and the shared expert of two layers
    for module in kept.values():
        assert all(parameter.numel() == 0 for parameter in module.parameters(recurse=False))
    trained = Decoder(model).to(torch.bfloat16)
    trained.load_state_dict(given.state_dict())
    for router in routers(trained):
        router.float_bias()
    apply_fp8(trained, FP8Config())
    for name, module in fp8_modules(trained).items():
        for weight in ("weight", "w13", "w2"):
            if hasattr(module, weight):
                exact = as_matrices(weight, given.get_submodule(name).get_parameter(weight))
                module.sources[weight] = partial(Fp8Weight.of, exact)
    rng = random.Random(0)
    cache = KvCache(model, 40, 16, torch.bfloat16, torch.device("cpu"))
    sequences = random_sequences(rng, cache, [9, 40])
    run_in_random_steps(rng, ModelRunner(export.model, cache), sequences, 20)
    for s in sequences:
        padded = torch.tensor([s.tokens + [0] * (-len(s.tokens) % 8)])
        expected = logits(trained.eval(), padded)[0]
        for position, row in s.rows.items():
            assert torch.equal(row, expected[position].float())


def test_absorbed_latents_in_fp8(tmp_path: Path) -> None:
    """The absorbed weights equal the dequantized FP8 blocks, although the module has no other
    weight."""
    given = replace(FAMILIES["deepseek-v3"], d_model=128)
    model = replace(given, attention=replace(given.attention, kv_lora_rank=128))
    decoder = Decoder(model)
    initialize(decoder, model, seed=0)
    write_fp8(decoder.eval(), tmp_path)
    export = open_export(tmp_path, "auto", "cpu")
    kept = fp8_modules(export.model)["layers.0.attention.wkv_b"]
    assert isinstance(kept, Fp8Linear) and not kept.weight.numel()
    meant = dequantised(decoder).get_parameter("layers.0.attention.wkv_b.weight")
    assert torch.equal(plain_weight(kept), meant)
    cache = KvCache(model, 10, 16, torch.bfloat16, torch.device("cpu"))
    (s,) = random_sequences(random.Random(0), cache, [40])
    run_in_random_steps(random.Random(0), ModelRunner(export.model, cache, absorbed=True), [s], 20)
    assert all(row.isfinite().all() for row in s.rows.values())


def test_an_update_keeps_weights_in_fp8(tmp_path: Path) -> None:
    """It dequantized them: twice the memory, and other tokens than after a new start."""
    for seed in range(2):
        given = Decoder(WIDE)
        initialize(given, WIDE, seed=seed)
        (tmp_path / str(seed)).mkdir()
        write_fp8(given.eval(), tmp_path / str(seed))
    old, new = (open_export(tmp_path / str(seed), "auto", "cpu") for seed in range(2))
    updated = load_update(old, tmp_path / "1")
    assert old.keeps_fp8 and updated.dtype == torch.bfloat16
    expected, found = new.model.state_dict(), updated.model.state_dict()
    assert fp8_modules(updated.model).keys() == fp8_modules(new.model).keys() != set()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    dequantized = open_export(tmp_path / "0", "bf16", "cpu")
    assert not fp8_modules(load_update(dequantized, tmp_path / "1").model)
