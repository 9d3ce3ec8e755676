"""A Llama in GGUF form, read as the Hugging Face checkpoint it was converted from.

llama.cpp rotates neighboring dimensions of a head, Hugging Face's Llama dimension i with
i + half, so the converter interleaves the two halves of every query and key head
(`convert_hf_to_gguf.py`, `LlamaModel.permute`). Reading reverts that. Otherwise only the names
differ.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from models.gguf.file import GgufFile, open_gguf
from models.hf.dense import DenseCheckpoint, dense_model, dense_tensors

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def open_llama_gguf(path: Path) -> tuple[DenseCheckpoint, GgufFile]:
    """The checkpoint in a GGUF file, and the file, which also contains the tokenizer.

    Raises UserError if it is not a Llama, or a name or shape contradicts its metadata.
    """
    file = open_gguf(path)
    raw = _config(file)
    model = dense_model(raw, str(path))
    shapes = {gguf_name(t.name): t.shape for t in dense_tensors(model)}
    for kind, names in (
        ("missing", shapes.keys() - file.tensors.keys()),
        ("unexpected", file.tensors.keys() - shapes.keys()),
    ):
        if names:
            raise UserError(f"{path}: {len(names)} tensors {kind}, the first is {min(names)}")
    for name, shape in shapes.items():
        if file.tensors[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(file.tensors[name].shape)}, "
                f"the metadata ask for {list(shape)}"
            )
    heads = {"q_proj": model.attention.n_heads, "k_proj": model.attention.kv_heads}

    def read(name: str) -> Tensor:
        value = file.read(gguf_name(name))
        n_heads = heads.get(name.split(".")[-2])
        return value if n_heads is None else halves(value, n_heads)

    checkpoint = DenseCheckpoint(
        place=str(path),
        architecture="LlamaForCausalLM",
        model=model,
        max_positions=file.get("llama.context_length", int),
        read=read,
    )
    return checkpoint, file


def halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder rows of every head from (0, half, 1, half + 1, ...) to (0, 1, 2, ...)."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in _OUTER:
        return _OUTER[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_OF_LAYER[rest.removesuffix('.weight')]}.weight"


def _config(file: GgufFile) -> dict[str, Any]:
    """The `config.json` that corresponds to the metadata."""
    if file.metadata.get("general.architecture") != "llama":
        given = file.metadata.get("general.architecture")
        raise UserError(f"{file.path}: general.architecture = {given!r}: only llama is read")
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(f"{file.path}: llama.rope.scaling.type = {scaling!r}: only none is read")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: 1 tensors missing, the first is token_embd.weight")
    width = file.get("llama.embedding_length", int)
    heads = file.get("llama.attention.head_count", int)
    head_dim = file.metadata.get("llama.attention.key_length", width // max(heads, 1))
    rotated = file.metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(
            f"{file.path}: llama.rope.dimension_count = {rotated}: only {head_dim}, the whole head"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "num_hidden_layers": file.get("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        # stored in fp32: 1e-5 is read as 9.99999974e-6
        "rms_norm_eps": float(f"{file.get('llama.attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_theta": file.metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
