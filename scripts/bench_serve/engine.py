"""`python -m scripts.bench_serve.engine EXPORT`: output tokens per second, in process.

Random token prompts of 128 tokens, 64 greedy tokens each (less if the model is shorter), for 1, 4
and 16 requests at once; best of three, since other load on the machine only slows it.
"""

import os
import random
import sys
import time
from pathlib import Path

import torch

from configs.command_line import CommandParser
from configs.errors import UserError
from serve.engine.request import SamplingParams
from serve.frontend.engine import Engine


def main() -> int:
    """Print one line per number of requests."""
    parser = CommandParser(prog="python -m scripts.bench_serve.engine", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        engine = Engine(options.export, dtype=options.dtype, cache="naive")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    length = min(192, engine.core.export.max_length)
    n_in, n_out = length * 2 // 3, length - length * 2 // 3
    params = SamplingParams(max_tokens=n_out, temperature=0, ignore_eos=True)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {options.threads} threads, torch "
        f"{torch.__version__}, {engine.core.export.dtype}, {n_in} tokens in, {n_out} out"
    )
    for n_requests in (1, 4, 16):
        seconds = min(_seconds(engine, n_requests, n_in, params) for _ in range(3))
        print(
            f"{n_requests:>3} requests: {n_requests * n_out / seconds:8,.0f} tokens/s", flush=True
        )
    return 0


def _seconds(engine: Engine, n_requests: int, n_in: int, params: SamplingParams) -> float:
    rng = random.Random(0)
    vocab = engine.core.export.model.config.vocab_size
    prompts = [[rng.randrange(1, vocab) for _ in range(n_in)] for _ in range(n_requests)]
    start = time.perf_counter()
    engine.generate(prompts, params)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
