"""`python -m scripts.bench_train.transformers_loop STEPS CORPUS DTYPE`: a loop over a Qwen3-MoE of
transformers.

One process, all cores, SDPA, fused AdamW, transformers' grouped products; the size
of the demo's model: 4 layers of width 256, 8 query and 4 key/value heads of 32, 8 experts of width
256 with top-2. Prints one JSON line per step.

CORPUS: a .npy of token ids (vocabulary 4096). DTYPE: bfloat16 of autocast, or float32 without it.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from scripts.bench_train.plain_loop import LENGTH, train


def build() -> Qwen3MoeForCausalLM:
    """The model, in fp32, from random values."""
    sizes: dict[str, Any] = {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
        "tie_word_embeddings": True, "output_router_logits": True, "use_cache": False,
        "attn_implementation": "sdpa", "experts_implementation": "grouped_mm",
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def main(steps: int, corpus: str, dtype: str) -> None:
    """Train it; its loss leaves out the first token of every window."""
    torch.manual_seed(0)
    model = build()

    def loss_of(window: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=window, labels=window).loss
        return loss

    train(model, loss_of, LENGTH, steps, corpus, dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
