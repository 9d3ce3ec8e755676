"""transformers: token by token with its KV cache; missing and unexpected tensors are errors."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to `request`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(request["folder"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    if wrong := {key: sorted(map(str, value)) for key, value in info.items() if value}:
        raise SystemExit(f"tensors do not fit: {wrong}")
    model.float()  # if a part is quantized, the rest has the dtype of the file
    greedy = [decode(model.eval(), prompt, request["n_tokens"]) for prompt in request["prompts"]]
    tokens, logprobs = zip(*greedy, strict=True)
    return {
        "version": f"transformers {transformers.__version__}",
        "encoded": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "chat": tokenizer.apply_chat_template(
            request["chat"], tokenize=False, add_generation_prompt=True
        ),
        "tokens": tokens,
        "logprobs": logprobs,
    }


@torch.no_grad()
def decode(model: Any, prompt: list[int], n: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities."""
    tokens: list[int] = []
    logprobs = []
    ids, cache = torch.tensor([prompt]), None
    for _ in range(n):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].float().log_softmax(-1).max(-1)
        tokens.append(int(best.indices))
        logprobs.append(float(best.values))
        ids = best.indices.view(1, 1)
    return tokens, logprobs


if __name__ == "__main__":
    answer = read(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
