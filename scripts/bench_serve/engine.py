"""`python -m scripts.bench_serve.engine EXPORT`: output tokens per second, in process.

Random token prompts of 128 tokens, 64 greedy tokens each (less if the model is shorter), for 1, 4
and 16 requests at once; best of three, since other load on the machine only slows it.
`--transformers` compares with `generate` of transformers, in turn.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.command_line import CommandParser
from configs.errors import UserError
from serve.engine.request import SamplingParams
from serve.frontend.engine import Engine
from train.report.environment import cpu_name

Generate = Callable[[list[list[int]], int], None]
"""Generates a number of greedy tokens for each prompt."""


def main() -> int:
    """Print one line per number of requests."""
    parser = CommandParser(prog="python -m scripts.bench_serve.engine", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        engine = Engine(options.export, dtype=options.dtype, cache="naive")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dtype, vocab = engine.core.export.dtype, engine.core.export.model.config.vocab_size
    engines = {"ours": _ours(engine)}
    if options.transformers:
        engines["transformers"] = _transformers(options.export, dtype)
    length = min(192, engine.core.export.max_length)
    n_in, n_out = length * 2 // 3, length - length * 2 // 3
    print(
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {os.cpu_count()} cores, {options.threads} "
        f"threads, torch {torch.__version__}, {dtype}, {n_in} tokens in, {n_out} out"
    )
    for n_requests in options.requests:
        rng = random.Random(n_requests)
        prompts = [[rng.randrange(1, vocab) for _ in range(n_in)] for _ in range(n_requests)]
        seconds = dict.fromkeys(engines, float("inf"))
        for _ in range(3):
            for name, generate in engines.items():
                start = time.perf_counter()
                generate(prompts, n_out)
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        rates = (f"{name} {n_requests * n_out / s:8,.0f} tokens/s" for name, s in seconds.items())
        print(f"{n_requests:>3} requests: {', '.join(rates)}", flush=True)
    return 0


def _ours(engine: Engine) -> Generate:
    def generate(prompts: list[list[int]], n_out: int) -> None:
        params = SamplingParams(max_tokens=n_out, temperature=0, ignore_eos=True)
        engine.generate(prompts, params)

    return generate


def _transformers(export: Path, dtype: torch.dtype) -> Generate:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(export, dtype=dtype)

    def generate(prompts: list[list[int]], n_out: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=n_out, max_new_tokens=n_out,
        )  # fmt: skip

    return generate


if __name__ == "__main__":
    sys.exit(main())
