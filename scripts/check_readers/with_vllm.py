"""vLLM on the CPU, its own model code and kernels, without torch.compile."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["OMP_NUM_THREADS"] = "2"  # with one it binds no threads

import vllm
from vllm import LLM, SamplingParams, TokensPrompt


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to `request`."""
    prompts, n_tokens = request["prompts"], request["n_tokens"]
    llm = LLM(
        request["folder"],
        dtype="float32",
        max_model_len=max(map(len, prompts)) + n_tokens,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        enable_prefix_caching=False,
        model_impl="vllm",  # never fall back to transformers' model, which would prove nothing
    )
    sampling = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, logprobs=0)
    done = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling)
    answers = [request.outputs[0] for request in done]
    tokenizer: Any = llm.get_tokenizer()
    return {
        "version": f"vllm {vllm.__version__}",
        "encoded": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "chat": tokenizer.apply_chat_template(
            request["chat"], tokenize=False, add_generation_prompt=True
        ),
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
    }


if __name__ == "__main__":
    answer = read(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
