"""llama.cpp through llama-cpp-python; `folder` is a GGUF file."""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to `request`."""
    longest = max(map(len, request["prompts"])) + request["n_tokens"]
    llm = llama_cpp.Llama(
        request["folder"],
        n_ctx=longest,
        n_batch=longest,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    greedy = [decode(llm, prompt, request["n_tokens"]) for prompt in request["prompts"]]
    tokens, logprobs = zip(*greedy, strict=True)
    return {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "encoded": [llm.tokenize(text.encode(), special=False) for text in request["texts"]],
        "chat": render(llm, request["chat"]),
        "tokens": tokens,
        "logprobs": logprobs,
    }


def decode(llm: Any, prompt: list[int], n: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities."""
    llm.reset()
    llm.eval(prompt)
    tokens: list[int] = []
    logprobs = []
    for _ in range(n):
        logits = llm.scores[llm.n_tokens - 1].astype(np.float64)
        best = int(logits.argmax())
        tokens.append(best)
        logprobs.append(float(-np.log(np.exp(logits - logits[best]).sum())))
        llm.eval([best])
    return tokens, logprobs


def render(llm: Any, messages: list[dict[str, str]]) -> str:
    """The chat as rendered by the template inside the GGUF."""
    eos, bos = (llm._model.token_get_text(i) for i in (llm.token_eos(), llm.token_bos()))
    template = llm.metadata["tokenizer.chat_template"]
    return str(Jinja2ChatFormatter(template, eos, bos)(messages=messages).prompt)


if __name__ == "__main__":
    answer = read(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
