"""Tied embeddings in architectures whose readers do not tie: the export also writes the head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.decoder import Decoder
from models.hf.files import INDEX, read_model
from models.hf.table import hf_tensors
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, read_all, write

WRITES_THE_HEAD = {
    *("glm4", "glm4-bare", "glm4-mtp", "deepseek-v3", "deepseek-v3-mtp", "deepseek-v2", "gpt-oss")
}


@pytest.mark.parametrize("name", FAMILIES)
def test_where_the_head_is_written(name: str, tmp_path: Path) -> None:
    decoder = random_decoder(replace(FAMILIES[name], tie_embeddings=True))
    write(decoder, tmp_path, shard_bytes=10**9)  # embedding and head in one shard
    tensors = read_all(tmp_path)
    assert ("lm_head.weight" in tensors) == (name in WRITES_THE_HEAD)
    embed = tensors["model.embed_tokens.weight"]
    assert torch.equal(tensors.get("lm_head.weight", embed), embed)
    assert torch.equal(read_model(tmp_path, torch.float32).embed.weight, embed)
    assert torch.equal(read_model(tmp_path, torch.bfloat16).embed.weight, embed.bfloat16())
    assert ("lm_head.weight" in (tmp_path / INDEX).read_text()) == (name in WRITES_THE_HEAD)
    untied = hf_tensors(replace(FAMILIES[name], tie_embeddings=False))
    assert [t.is_copy for t in untied if t.name == "lm_head.weight"] == [False]


def rewrite(folder: Path, head: torch.Tensor | None) -> None:
    (file,) = folder.glob("*.safetensors")
    (folder / INDEX).unlink(missing_ok=True)
    file = file.rename(folder / "model.safetensors")
    tensors = {key: value for key, value in load_file(file).items() if key != "lm_head.weight"}
    save_file(tensors | ({} if head is None else {"lm_head.weight": head}), file)


def test_reading_with_another_head_or_none(tmp_path: Path) -> None:
    decoder: Decoder = random_decoder(FAMILIES["glm4"])
    write(decoder, tmp_path, shard_bytes=10**9)
    rewrite(tmp_path, None)  # as saved by transformers
    assert torch.equal(read_model(tmp_path, torch.float32).embed.weight, decoder.embed.weight)
    rewrite(tmp_path, decoder.embed.weight.detach() + 1)
    with pytest.raises(UserError, match=r"tie_word_embeddings = true, but lm_head\.weight"):
        read_model(tmp_path, torch.float32)
    rewrite(tmp_path, torch.zeros(3, 4))
    with pytest.raises(UserError, match=r"tie_word_embeddings = true, but lm_head\.weight"):
        read_model(tmp_path, torch.float32)
