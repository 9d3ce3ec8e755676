"""`python -m scripts.bench_train.transformers_loop STEPS CORPUS`: a loop over a Qwen3-MoE of
transformers.

One process, all cores, bf16 autocast, SDPA, fused AdamW, transformers' grouped products; the size
of the demo's model: 4 layers of width 256, 8 query and 4 key/value heads of 32, 8 experts of width
256 with top-2. Prints one JSON line per step.

CORPUS: a .npy of token ids (vocabulary 4096).
"""

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

LENGTH, BATCH = 256, 8


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


def main(steps: int, corpus: str) -> None:
    """Train for `steps` steps and print loss, tokens/s and the peak of memory at each."""
    torch.manual_seed(0)
    tokens = torch.from_numpy(np.load(corpus, allow_pickle=False).astype(np.int64))
    model = build()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(1, steps + 1):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 30)
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,))
        window = torch.stack([tokens[s : s + LENGTH] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speed = BATCH * LENGTH / (time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        record = {"step": step, "loss": loss.item(), "tokens_per_s": speed, "memory_gib": peak}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
