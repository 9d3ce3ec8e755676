"""Results of transformers for a config.json and a folder, and ours.

transformers is imported once per process, when a test first needs it.
"""

import copy
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.dense import open_dense
from models.hf.files import read_model

SEVEN = ("qwen3", "glm4", "mixtral", "deepseek-v3", "deepseek-v2", "gpt-oss", "llama4")
"""Names in `tests.models.families` of one model of every family."""
DENSE = ("LlamaConfig", "MistralConfig", "Qwen3Config")
"""Sources of upcycling, by the names of their configurations in transformers."""
TOKENS = torch.randint(0, 96, (37,), generator=torch.Generator().manual_seed(0))


@functools.cache
def transformers() -> Any:
    """The transformers module, with logging disabled."""
    import transformers as module

    module.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def their_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of the configuration that transformers creates; raises its errors."""
    kind = transformers().CONFIG_MAPPING[raw["model_type"]]
    return dict(kind.from_dict(copy.deepcopy(raw)).to_dict())


def their_logits(folder: Path) -> Tensor:
    """transformers' logits of TOKENS. Raises if it refuses the folder or weights are missing."""
    model, info = transformers().AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    wrong = {k: v for k, v in info.items() if v and k != "unexpected_keys"}
    assert not wrong, wrong
    with torch.no_grad():
        logits: Tensor = model.eval()(TOKENS[None]).logits[0]
    return logits


def logits_of(decoder: Decoder) -> Tensor:
    """Logits of TOKENS."""
    positions = torch.arange(len(TOKENS))
    with torch.no_grad():
        return decoder(TOKENS, positions, DocumentAttention(positions[None]))


def our_logits(folder: Path) -> Tensor:
    """Logits of TOKENS, with the folder read as by import and server."""
    return logits_of(read_model(folder, torch.float32))


def our_dense_logits(folder: Path) -> Tensor:
    """Logits of TOKENS, with the folder read as by upcycling."""
    dense = open_dense(folder)
    decoder = Decoder(dense.model)
    state = decoder.state_dict()
    for part in dense.parts():
        for name, value in part.items():
            state[name].copy_(value)
    return logits_of(decoder.eval())


def with_config(folder: Path, raw: dict[str, Any], target: Path) -> Path:
    """A folder with the weights of `folder`, as links, and another config.json."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, copy_function=os.link)
    (target / "config.json").unlink(missing_ok=True)  # not written into that of `folder`
    (target / "config.json").write_text(json.dumps(raw))
    return target


def follow_or_refuse(folder: Path, raw: dict[str, Any], target: Path) -> str:
    """Read the weights of `folder` with another config.json. Returns our error message, which is
    one line of bounded length, or "" if our logits equal those of transformers."""
    with_config(folder, raw, target)
    dense = raw["model_type"] in ("llama", "mistral", "qwen3")
    try:
        ours = our_dense_logits(target) if dense else our_logits(target)
    except UserError as error:
        assert str(target) in str(error), error
        told = str(error).replace(str(target), "")
        assert "\n" not in told and len(told) < 700, error
        return told
    theirs = their_logits(target)
    difference = float((ours - theirs).norm() / theirs.norm())
    assert difference < 1e-5, f"accepted, and logits differ by {difference:.1e}"
    return ""
