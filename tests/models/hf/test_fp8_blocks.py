"""Export in DeepSeek's FP8: every bit against plain loops; transformers computes the same."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.loader import load
from configs.model import AttentionConfig, ModelConfig
from kernels.quantization.quantize import quantize_128x128
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.files import Index, read_model, write_tensors
from models.hf.fp8_blocks import fp8_plan
from models.hf.quantized import dequantize_fp8
from models.hf.table import hf_config, hf_tensors
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, read_all, relative
from tests.runs import ROOT, run

FP8 = torch.float8_e4m3fn
LOAD = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8
quantizer_finegrained_fp8.is_accelerate_available = lambda: True  # it asks, and never uses it
results = {}
for folder in sys.argv[1:]:
    name = folder.rpartition("/")[2]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
            experts_implementation="eager",
        )
    except Exception as error:
        results[name] = str(error)
        continue
    model.float()  # what is not quantised comes as it lies in the file: bf16
    logits = model(load_file(folder + "/given.check")["tokens"]).logits.detach()
    save_file({"logits": logits}, folder + "/theirs.check")
    results[name] = {key: sorted(map(str, value)) for key, value in info.items() if value}
print(json.dumps(results))
"""


def wide(name: str) -> ModelConfig:
    """A family's model in sizes that readers support: full blocks, a partial one, and several
    blocks."""
    model = FAMILIES[name]
    if model.attention.kind == "mla":
        attention = AttentionConfig(
            kind="mla", n_heads=4, q_lora_rank=128 if model.attention.q_lora_rank else 0,
            kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
        )  # fmt: skip
    else:
        attention = replace(model.attention, n_heads=4, n_kv_heads=2, head_dim=64)
    return replace(
        model, d_model=256, d_ff=384 if model.d_ff else 0, attention=attention,
        moe=replace(model.moe, n_experts=4, n_groups=min(model.moe.n_groups, 2),
                    top_groups=min(model.moe.top_groups, 1), top_k=2, d_expert=128),
    )  # fmt: skip


def ragged() -> ModelConfig:
    """Partial blocks after full ones: 304 rows, 272 and 320 columns."""
    model = wide("deepseek-v3")
    attention = replace(model.attention, kv_lora_rank=272, v_head_dim=80)
    return replace(model, attention=attention)


def unfit() -> ModelConfig:
    """Experts and attention in sizes that some reader does not support."""
    model = wide("qwen3")
    attention = replace(model.attention, head_dim=40)
    return replace(model, attention=attention, moe=replace(model.moe, d_expert=96))


MODELS = {n: wide(n) for n in FAMILIES if n not in ("gpt-oss", "llama4")}
MODELS |= {"ragged": ragged(), "unfit": unfit()}
decoder_of = cache(lambda name: random_decoder(MODELS[name]))
"""The decoder of each; no test changes it."""
WITH_MTP = [
    pytest.param(name, marks=[pytest.mark.slow] if f"{name}-mtp" in MODELS else [])
    for name in MODELS
]
"""By default without those whose tensors are a part of those of the same model with MTP modules;
`test_transformers_computes_the_same` has them."""


def write_fp8(decoder: Decoder, folder: Path, shard_bytes: int = 400_000) -> list[Path]:
    state = decoder.state_dict()
    folder.mkdir(exist_ok=True)
    files = write_tensors(folder, decoder.config, lambda n, i: state[n][i], FP8, shard_bytes)
    described = hf_config(decoder.config, max_positions=64, eos_token_id=0, dtype="bfloat16")
    described["quantization_config"] = fp8_plan(decoder.config).quantization_config()
    (folder / "config.json").write_text(json.dumps(described))
    return files


def by_loops(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 data, factors, and dequantized values, one block after the other."""
    starts = [range(0, n, 128) for n in weight.shape]
    factors = torch.empty(len(starts[0]), len(starts[1]))
    data, meaning = weight.to(FP8), weight.clone()
    for i, r in enumerate(starts[0]):
        for j, c in enumerate(starts[1]):
            at = slice(r, r + 128), slice(c, c + 128)
            factors[i, j] = max(weight[at].abs().max() / 448, torch.tensor(2.0**-80))
            data[at] = (weight[at] / factors[i, j]).to(FP8)
            meaning[at] = data[at].float() * factors[i, j]
    return data, factors, meaning


@cache
def dequantised(decoder: Decoder) -> Decoder:
    """A decoder with the weights to which an FP8 export of the given one dequantizes."""
    plan, again = fp8_plan(decoder.config), Decoder(decoder.config)
    given, state = decoder.state_dict(), again.state_dict()
    for t in hf_tensors(decoder.config):
        if t.ours is None or t.is_copy:
            continue
        theirs = t.to_hf(given[t.ours][t.index])
        if t.name in plan.quantized:
            theirs = by_loops(theirs)[2]
        elif not t.keep_fp32:
            theirs = theirs.bfloat16().float()
        part = state[t.ours][t.index]
        part.copy_(t.from_hf(theirs, part.shape))
    return again.eval()


def logits(decoder: Decoder, tokens_BL: Tensor) -> Tensor:
    positions = torch.arange(tokens_BL.shape[1]).expand(tokens_BL.shape)
    with torch.no_grad():
        out = decoder(tokens_BL.reshape(-1), positions.reshape(-1), DocumentAttention(positions))
    return out.view(*tokens_BL.shape, -1)


@pytest.mark.parametrize("name", WITH_MTP)
def test_every_tensor_is_that_of_plain_loops(name: str, tmp_path: Path) -> None:
    """Bit for bit: gate and up have separate blocks although they are one matrix here, each expert
    has its own blocks, blocks at the edge are smaller, everything else is bf16, the index is
    complete."""
    decoder = decoder_of(name)
    files = write_fp8(decoder, tmp_path)
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored: dict[str, Tensor] = {}
    n_bytes = 0
    for path in files:
        tensors = load_file(path)
        held = sum(v.nbytes for v in tensors.values())
        assert held <= 400_000 or len(tensors) <= 2, "a tensor and its factors, or within the limit"
        n_bytes += held
        stored |= tensors
        assert all(index["weight_map"][key] == path.name for key in tensors)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == n_bytes
    state, plan = decoder.state_dict(), fp8_plan(decoder.config)
    for t in hf_tensors(decoder.config):
        theirs = torch.zeros(t.shape) if t.ours is None else t.to_hf(state[t.ours][t.index])
        value = stored.pop(t.name)
        if t.name in plan.quantized:
            data, factors, _ = by_loops(theirs)
            assert value.dtype == FP8
            assert torch.equal(value.view(torch.uint8), data.view(torch.uint8)), t.name
            scale = stored.pop(f"{t.name}_scale_inv")
            assert scale.dtype == torch.float32 and torch.equal(scale, factors), t.name
        else:
            kind = torch.float32 if t.keep_fp32 else torch.bfloat16
            assert value.dtype == kind and torch.equal(value, theirs.to(kind)), t.name
    assert not stored


@pytest.mark.parametrize("name", [name for name in MODELS if name != "unfit"])
def test_only_projections_are_quantised(name: str) -> None:
    """Each matrix is either a projection in FP8 or in the list of matrices that readers do not
    convert."""
    model = MODELS[name]
    plan = fp8_plan(model)
    alone = plan.quantization_config()["modules_to_not_convert"]
    kinds = ("embed_tokens", "lm_head", "gate", "eh_proj", "head")
    matrices = [t.name for t in hf_tensors(model) if len(t.shape) == 2]
    for matrix in matrices:
        module = matrix.removesuffix(".weight")
        assert (matrix in plan.quantized) != (module in alone)
        assert (module.rpartition(".")[2] in kinds) == (module in alone), module
    assert plan.quantized < set(matrices) and plan.unfit == ()
    for tied in (True, False):  # readers have a head in either case
        assert "lm_head" in fp8_plan(replace(model, tie_embeddings=tied)).plain


@pytest.mark.parametrize("name", WITH_MTP)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """Reading an export gives exactly the dequantized weights. Exporting those gives the same
    bits."""
    write_fp8(decoder_of(name), tmp_path / "a")
    again = read_model(tmp_path / "a", torch.float32, mtp=True)
    expected = dequantised(decoder_of(name)).state_dict()
    for key, value in again.state_dict().items():  # GLM without a shared expert gets one of zeros
        assert torch.equal(value, expected.get(key, torch.zeros_like(value))), key
    write_fp8(again, tmp_path / "b", shard_bytes=250_000)
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value.float(), second[key].float()), key


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    """All families in one process. Tolerance for fp32 in another order of summation: 1e-5 of the
    norm, as for exports without quantization. transformers raises an error for matrices with a
    partial last block."""
    tokens = torch.randint(0, 96, (2, 37), generator=torch.Generator().manual_seed(0))
    names = [name for name in MODELS if not name.endswith("mtp")]  # unknown to transformers
    for name in names:
        write_fp8(decoder_of(name), tmp_path / name)
        save_file({"tokens": tokens}, tmp_path / name / "given.check")
    folders = [tmp_path / name for name in names]
    results = json.loads(run("-P", "-c", LOAD, *folders).stdout.splitlines()[-1])
    assert "issues during automatic conversion of the weights" in results.pop("ragged")
    for name, wrong in results.items():
        assert not wrong, name
        theirs = load_file(tmp_path / name / "theirs.check")["logits"]
        assert relative(logits(dequantised(decoder_of(name)), tokens), theirs) < 1e-5, name
        assert relative(logits(decoder_of(name), tokens), theirs) > 1e-3, "quantised it was"


def test_quantising_a_dequantised_weight_changes_no_bit() -> None:
    """For every amax of a binade (its scale is amax / 448, rounded), the largest number becomes
    448, so amax and scale are reproduced; 1 of 9 arbitrary scales would change by one bit. Then
    whole matrices with zeros, tiny blocks and edges, as in the first step of a training."""
    amax = torch.arange(2**23, 2**24, dtype=torch.int32).float()
    scale = amax / 448
    assert torch.equal(scale * 448 / 448, scale)
    assert (amax / scale).to(FP8).float().eq(448).all()
    torch.manual_seed(0)
    for shape in ((128, 128), (300, 257), (1, 513), (1000, 40)):
        weight = torch.randn(shape) * torch.logspace(-40, 3, shape[1])
        weight[:, :3] = 0
        (data, scales), _ = quantize_128x128(weight)
        imported = dequantize_fp8(data, scales, (128, 128))
        (again, scales_again), _ = quantize_128x128(imported)
        assert torch.equal(scales_again, scales)
        assert torch.equal(again.float(), data.float())
    foreign = torch.randint(2**23, 2**24, (2**16,)).float()
    moved = (foreign * 448 / 448).view(torch.int32) - foreign.view(torch.int32)
    assert moved.abs().max() == 1 and 0.09 < moved.ne(0).float().mean() < 0.12
    assert torch.equal(foreign * 448 / 448 * 448 / 448, foreign * 448 / 448)


def test_quantising_an_imported_weight_in_other_ways() -> None:
    """Quantized from bf16: the same data, factors within its rounding (2^-8). With powers of two on
    both sides: the same values. Powers of two, then amax / 448: another rounding."""
    torch.manual_seed(0)
    weight = torch.randn(512, 384) * torch.logspace(-3, 3, 384)
    (data, scales), _ = quantize_128x128(weight)
    (again, others), _ = quantize_128x128(dequantize_fp8(data, scales, (128, 128)).bfloat16())
    assert torch.equal(again.float(), data.float())
    assert 0 < float((others / scales - 1).abs().max()) <= 2**-8

    weight[:128, :128].clamp_(-1, 1)[0, 0] = 1.001  # rounds down to a power of two: 224 * scale
    (data, scales), _ = quantize_128x128(weight, power_of_two=True)
    imported = dequantize_fp8(data, scales, (128, 128))
    (again, others), _ = quantize_128x128(imported, power_of_two=True)
    assert torch.equal(dequantize_fp8(again, others, (128, 128)), imported)
    (again, others), _ = quantize_128x128(imported)
    assert not torch.equal(dequantize_fp8(again, others, (128, 128)), imported)


@pytest.mark.parametrize("rows", [96, 128, 192, 300, 320, 384, 576])
def test_what_readers_would_refuse_or_misread_stays_bf16(rows: int) -> None:
    """Keys with these numbers of rows are concatenated with queries and values; experts have as
    many rows. 576 rows are those of DeepSeek-V3's kv_a_proj_with_mqa, which is the last and
    therefore quantized."""
    model = wide("qwen3")
    attention = replace(model.attention, n_heads=2, n_kv_heads=2, head_dim=rows // 2)
    keys = replace(model, attention=attention)
    whole = rows % 128 == 0
    assert ("model.layers.0.self_attn.qkv_proj" in fp8_plan(keys).unfit) == (not whole)
    experts = fp8_plan(replace(model, moe=replace(model.moe, d_expert=rows)))
    assert ("model.layers.1.mlp.experts" in experts.unfit) == (not whole)
    assert ("model.layers.1.mlp.experts" in experts.plain) == (not whole)
    latent = wide("deepseek-v3")
    attention = replace(latent.attention, kv_lora_rank=rows - 32)
    joined = "model.layers.0.self_attn.fused_qkv_a_proj"
    plan = fp8_plan(replace(latent, attention=attention))
    assert (joined in plan.unfit) == (rows in (192, 300)), "2 x 96 and 3 x 100 would be misread"
    names = ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")
    listed = {n for n in names if f"model.layers.0.self_attn.{n}" in plan.plain}
    assert listed == (set(names) if rows in (192, 300) else set())


def test_deepseek_v3_is_quantised_as_published() -> None:
    """All projections of all layers are quantized, including kv_a_proj_with_mqa (576 rows), with
    the keys of DeepSeek-V3's config.json; the only addition is the list of unquantized matrices,
    which other readers need."""
    model = replace(load(ROOT / "configs/deepseek_v3_671b.toml", []).model, n_layers=4)
    plan = fp8_plan(model)
    config = plan.quantization_config()
    assert plan.unfit == ()
    gates = [f"model.layers.{i}.mlp.gate" for i in range(3, model.n_layers + model.mtp_depth)]
    assert {n for n in config.pop("modules_to_not_convert") if "gate" in n} == set(gates)
    assert config == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }  # fmt: skip


def test_pieces_are_small_and_begin_with_a_block(tmp_path: Path) -> None:
    """The number of rows read at a time, an eighth of a shard or one row of blocks, does not change
    any bit."""
    decoder = decoder_of("ragged")
    state, seen = decoder.state_dict(), []

    def read(name: str, index: Index) -> Tensor:
        value = state[name][index]
        rows = index[-1]
        assert isinstance(rows, slice)
        if value.dim() == 2 and not name.startswith(("embed", "head")) and "router" not in name:
            assert rows.start % 128 == 0
            seen.append(value.shape[0])
        return value

    parts = []
    for shard_bytes in (4_000, 2**20, 2**30):
        folder = tmp_path / str(shard_bytes)
        folder.mkdir()
        write_tensors(folder, decoder.config, read, FP8, shard_bytes)
        parts.append(read_all(folder))
        if shard_bytes == 4_000:
            assert max(seen) == 128
    assert max(seen) > 128
    for other in parts[1:]:
        assert other.keys() == parts[0].keys()
        assert all(torch.equal(v.float(), other[k].float()) for k, v in parts[0].items())


def test_refusals_are_one_line(tmp_path: Path) -> None:
    for name, expected in (("gpt-oss", "GptOss"), ("llama4", "Llama4")):
        with pytest.raises(UserError, match=rf"--dtype fp8: {expected}.*no reader has") as error:
            fp8_plan(FAMILIES[name])
        assert "\n" not in str(error.value)
    narrow = replace(wide("mixtral"), d_model=192)
    narrow = replace(narrow, moe=replace(narrow.moe, d_expert=64))
    with pytest.raises(UserError, match=r"model\.d_model = 192, model\.moe\.d_expert = 64"):
        fp8_plan(narrow)
    decoder = random_decoder(wide("mixtral"))
    with torch.no_grad():
        decoder.state_dict()["layers.1.ffn.experts.w2"][3, 5, 7] = float("inf")
    with pytest.raises(UserError, match=r"1\..*experts\.3\.w2\.weight holds inf or NaN"):
        write_fp8(decoder, tmp_path)
