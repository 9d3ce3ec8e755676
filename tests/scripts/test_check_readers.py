"""Other programs that read an export: what is compared, what counts as a difference, which hints
GGUF conversion gets."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.errors import UserError
from models.decoder import Decoder
from models.hf.files import read_model, write_tensors
from models.hf.table import hf_config
from models.init import initialize
from scripts.check_readers import __main__ as check_readers
from scripts.check_readers.__main__ import READERS, TEXTS, TOLERANCE, check, differences, prompts_of
from tests.forked_python import interpreter
from tests.models.families import FAMILIES
from tests.runs import run
from tests.train.tokenizer.test_tokenizer import texts
from train.convert.gguf_export import export_gguf, llama_cpp_words
from train.tokenizer.hf_files import export_tokenizer
from train.tokenizer.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4 MoE with tied embeddings, as the demo exports it, with random weights."""
    folder = tmp_path_factory.mktemp("export")
    decoder = Decoder(replace(FAMILIES["glm4"], vocab_size=300, init_std=0.2))
    initialize(decoder, decoder.config, seed=0)
    state = decoder.state_dict()
    write_tensors(folder, decoder.config, lambda name, i: state[name][i], torch.float32)
    described = hf_config(decoder.config, max_positions=64, eos_token_id=0, dtype="float32")
    (folder / "config.json").write_text(json.dumps(described))
    given = folder / "given.json"
    train_tokenizer(texts, 300, lambda line: None).save(str(given))
    export_tokenizer(given, folder, 64)
    return folder


@pytest.mark.slow
def test_transformers_agrees_and_the_others_are_not_called_a_success(export: Path) -> None:
    pytest.importorskip("transformers")
    done = run("-m", "scripts.check_readers", export, code=3)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Glm4MoeForCausalLM: ") and " 1 to 32 tokens" in lines[0]
    assert lines[1].startswith("transformers ") and ": equal, log-prob" in lines[1]
    assert len(lines) == 1 + len(READERS)
    assert all(": not tried; install with: pip install" in line for line in lines[2:])


def test_a_reader_that_lost_an_expert_is_found(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our model has one expert less here, which makes no difference to the comparison."""
    pytest.importorskip("transformers")

    def lossy(folder: Path, dtype: torch.dtype) -> Decoder:
        decoder = read_model(folder, dtype)
        with torch.no_grad():
            decoder.state_dict()["layers.2.ffn.experts.w2"][3].zero_()
        return decoder

    monkeypatch.setattr(check_readers, "read_model", lossy)
    found = check(export, {"transformers": interpreter(tmp_path)}, None, TOLERANCE)
    assert found["vllm"] is found["llama_cpp"] is found["openvino"] is None
    assert found["transformers"] and "log-probabilities are off" in found["transformers"][-1]


def test_a_reader_that_fails_says_why(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(check_readers, "N_TOKENS", 2)  # of ours, which nothing is compared with

    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["check_readers", *map(str, arguments)])
        return check_readers.main()

    found = check(export, {"vllm": sys.executable, "openvino": "/no/python"}, None, TOLERANCE)
    assert found["vllm"] == ["failed: ModuleNotFoundError: No module named 'vllm' (exit code 1)"]
    assert found["openvino"] and "/no/python" in found["openvino"][0]
    only = ["--transformers", "", "--vllm", sys.executable]
    assert main(export, *only) == 1
    assert "vllm: failed" in capsys.readouterr().out
    assert main(tmp_path) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def answer(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": [[1, 2, 3], [4, 5, 6]],
        "logprobs": [[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]],
        "encoded": [[0] for _ in TEXTS],
        "chat": "chat",
    } | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"tokens": [[1, 2, 3], [4, 5, 7]]}, ["prompt 1: 2 of 3"]),
        ({"tokens": [[1, 2, 3], [4, 5]]}, ["prompt 1: 2 of 3"]),
        ({"tokens": [[9, 2, 3], [9, 5, 6]]}, ["prompt 0: 0", "prompt 1: 0", "off by up to inf"]),
        ({"logprobs": [[-1, -2, -3], [-1, -1, -1.001]]}, ["off by up to 1.0e-03"]),
        ({"logprobs": [[-1, -2, -3], [-1, math.nan, -1]]}, ["off by up to nan"]),
        ({"logprobs": [[-1, -2, -3], [-1, -1, -1.00005]]}, []),
        ({"encoded": [[0] for _ in TEXTS[1:]] + [[0, 1]]}, [r"'' becomes tokens [0, 1], not [0]"]),
        ({"chat": "chat "}, ["the chat becomes 'chat ', not 'chat'"]),
    ],
)  # fmt: skip
def test_differences(changes: dict[str, Any], expected: list[str]) -> None:
    found = differences(answer(), answer(**changes), 1e-4)
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def test_prompts_leave_room() -> None:
    tokenizer = Tokenizer.from_str(train_tokenizer(texts, 300, lambda line: None).to_str())
    prompts = prompts_of(tokenizer, 50, 20)
    assert max(map(len, prompts)) == 30 and min(map(len, prompts)) == 1
    assert len(prompts_of(tokenizer, 4096, 20)) == len(TEXTS) + 1
    with pytest.raises(UserError, match="max_position_embeddings = 20: must be more than 20"):
        prompts_of(tokenizer, 20, 20)


def test_the_name_of_the_words(export: Path, tmp_path: Path) -> None:
    assert llama_cpp_words(export) == "llama-bpe"
    for name, model, cut in (
        ("merges", models.BPE(), Tokenizer.from_file(str(export / "tokenizer.json")).pre_tokenizer),
        ("gpt-2", models.BPE(ignore_merges=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = cut
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        assert llama_cpp_words(tmp_path / name) is None


CONVERTER = """
import sys
class Model:
    def get_vocab_base_pre(self, tokenizer): raise NotImplementedError("not recognized")
    def set_vocab(self): raise KeyError("[gMASK]")
    def _set_vocab_gpt2(self): return self.get_vocab_base_pre(None)
def get_model_class(name, mmproj=False): return Model
def main():
    folder, _, out, _, dtype = sys.argv[1:]
    open(out, "w").write(get_model_class("Glm4MoeForCausalLM")().set_vocab() + " " + dtype)
if __name__ == "__main__":
    main()
"""


def test_the_converter_is_told_how_words_are_cut(export: Path, tmp_path: Path) -> None:
    """A converter with llama.cpp's two obstacles: an unknown hash, and GLM's own tokens."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    out = tmp_path / "model.gguf"
    done = run("-m", "scripts.to_gguf", export, "--llama-cpp", tmp_path, "--out", out)
    assert done.stdout == f"wrote {out}\n" and out.read_text() == "llama-bpe bf16"
    out.unlink()
    given = tmp_path / "given"  # for a given tokenizer the converter is not changed
    given.mkdir()
    for file in export.iterdir():
        (given / file.name).write_bytes(file.read_bytes())
    Tokenizer(models.BPE()).save(str(given / "tokenizer.json"))
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py: KeyError: '\[gMASK\]'"):
        export_gguf(given, out, "f32", tmp_path, sys.executable)
    with pytest.raises(UserError, match="name a source tree"):
        export_gguf(export, out, "f32", export, sys.executable)
    assert {path.name for path in tmp_path.glob("*.partial")} == set() and not out.exists()
