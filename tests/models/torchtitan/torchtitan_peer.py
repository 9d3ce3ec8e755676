"""Runs torchtitan's own DeepSeek-V3 debug model on given weights; a separate program, because it
patches torchtitan.

Started as `torchtitan_peer.py FOLDER`. FOLDER/given.safetensors contains our weights under our
names, and `tokens` and `targets` [B, L] (one document per row). FOLDER/theirs.safetensors receives
the loss sums (model, MTP module) with torchtitan as shipped, whose experts cast to bf16
(`as_shipped`), and without that cast (`losses`); for the latter also every gradient of their sum,
under our names.

On the CPU, attention uses SDPA instead of FlexAttention (torchtitan's own class). The fp32 autocast
around its gate does nothing on a CPU; in this fp32 model it would change nothing.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.deepseek_v3 import MTPLoss, model_registry

NORM_EPS = 1e-6
N_LAYERS = 3
"""Of six: a dense one and two alike."""


def build() -> torch.nn.Module:
    config = model_registry("debugmodel", num_mtp_layers=1).model
    config.layers = config.layers[:N_LAYERS]
    for layer in (*config.layers, *config.mtp_layers):
        assert isinstance(layer.attention.inner_attention, FlexAttention.Config)
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = NORM_EPS
    return model


def pairs(names: list[str]) -> list[tuple[str, int | None, str]]:
    """(our name, index in the gate/up dimension, their name) of every tensor."""
    found: list[tuple[str, int | None, str]] = []
    outer = {"embed.weight": "tok_embeddings.weight", "norm.weight": "norm.weight",
             "head.weight": "lm_head.weight"}  # fmt: skip
    for name in names:
        theirs = name.replace("mtp.", "mtp_layers.").replace("kv_a_norm", "kv_norm")
        if name in outer:
            found.append((name, None, outer[name]))
        elif ".experts." in name:
            base = theirs.split("ffn.")[0] + "moe.routed_experts.inner_experts."
            if name.endswith("w13"):
                found += [(name, 0, f"{base}w1_EFD"), (name, 1, f"{base}w3_EFD")]
            else:
                found.append((name, None, f"{base}w2_EDF"))
        elif ".router." in name:
            end = "expert_bias_E" if name.endswith("bias_E") else "router.gate.weight"
            found.append((name, None, f"{theirs.split('ffn.')[0]}moe.{end}"))
        elif ".ffn." in name:
            dense = theirs.replace("ffn.shared_experts.", "moe.shared_experts.")
            base = dense.replace("ffn.", "feed_forward.").rsplit(".", 1)[0]
            if name.endswith("w13"):
                found += [(name, 0, f"{base}.w1.weight"), (name, 1, f"{base}.w3.weight")]
            else:
                found.append((name, None, f"{base}.w2.weight"))
        elif name.startswith("mtp.") and name.endswith(".0.norm.weight"):
            found.append((name, None, theirs.replace(".norm.", ".mtp_norm.")))
        else:
            found.append((name, None, theirs))
    return found


def part(value: Tensor, index: int | None) -> Tensor:
    """Gate (0) or up (1) of a `w13`, or the whole."""
    return value if index is None else value.select(-3, index)


def losses(model: torch.nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Loss sums of the model and of its MTP module, by torchtitan's own loss."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    outputs = model(tokens, positions, None)
    loss = MTPLoss(MTPLoss.Config(mtp_scale=1.0), compile_config=None)
    total, _ = loss(outputs, targets, positions=positions)
    first = loss.fn(outputs[0], targets)
    return torch.stack([first, total - first])


def main(folder: Path) -> None:
    given = load_file(folder / "given.safetensors")
    batch = given.pop("tokens"), given.pop("targets")
    model, mapping = build(), pairs(list(given))
    state = {theirs: part(given[ours], index) for ours, index, theirs in mapping}
    wrong = model.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys, wrong.unexpected_keys
    assert all("tokens_per_expert" in k or "cache" in k for k in wrong.missing_keys), wrong
    with torch.no_grad():
        as_shipped = losses(model, *batch)
    torch.Tensor.bfloat16 = lambda self: self  # type: ignore[assignment,method-assign,return-value]
    exact = losses(model, *batch)
    exact.sum().backward()
    result = {"as_shipped": as_shipped, "losses": exact.detach()}
    gradients = dict(model.named_parameters())
    for ours, index, theirs in mapping:
        if theirs in gradients:
            suffix = "" if index is None else f"/{index}"
            gradient = gradients[theirs].grad
            assert gradient is not None, theirs
            result[f"{ours}{suffix}"] = gradient.contiguous()
    save_file(result, folder / "theirs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
