"""`python -m scripts.bench_serve.overhead EXPORT`: the cost of a step without the model.

Random prompts that share nothing, so the radix tree is only work here. Greedy tokens, all requests
at once. Of the time of all steps it prints the shares of:

- model: the forward pass, without sampling,
- sampling,
- radix tree: searching, inserting, locking and evicting,
- the rest of Python: scheduler, page tables, layout, reading results, detokenizing,

and then tokens per second with and without overlap, and with the naive cache, in alternating
rounds; the best round of each.
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
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.engine.request import SamplingParams
from train.report.environment import cpu_name


class Timed:
    """Passes everything on to `inner`; `seconds` is the time in calls of its methods."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._timed(value) if callable(value) else value

    def _timed(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def build(export: Export, requests: int, **options: Any) -> EngineCore:
    """An engine that runs `requests` at once."""
    size = max(512, requests)
    options |= {"max_running": requests, "max_batch_tokens": size}
    return EngineCore(export, EngineOptions(**options))


def generate(core: EngineCore, requests: int, rng: random.Random) -> float:
    """Seconds for `requests` prompts of 128 tokens and 64 tokens each, or less for a short
    model."""
    vocab, length = core.sampler.n_tokens, min(192, core.inputs.info.longest)
    n_out = length // 3
    params = SamplingParams(max_tokens=n_out, temperature=0, ignore_eos=True)
    prompts = [[rng.randrange(vocab) for _ in range(length - n_out)] for _ in range(requests)]
    made = [one for prompt in prompts for one in core.make_requests(prompt, params)]
    start = time.perf_counter()
    core.scheduler.add(made)
    while core.busy:
        core.step()
    return time.perf_counter() - start


def shares(core: EngineCore, requests: int, rounds: int, rng: random.Random) -> dict[str, float]:
    """Shares of the time of all steps."""
    parts = Timed(core.executor.runner), Timed(core.sampler), Timed(core.pages.prefixes)
    core.executor.runner, core.executor.sampler, core.pages.prefixes = parts  # type: ignore[assignment]
    total = sum(generate(core, requests, rng) for _ in range(rounds))
    found = dict(
        zip(("model", "sampling", "radix tree"), (p.seconds / total for p in parts), strict=True)
    )
    return found | {"other Python": 1 - sum(found.values())}


def main() -> int:
    """Print the shares, then the ratios."""
    parser = CommandParser(prog="python -m scripts.bench_serve.overhead", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        export = open_export(options.export, "auto", "cpu")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {options.threads} threads, "
        f"torch {torch.__version__}, {export.dtype}"
    )
    for requests in options.requests:
        rng = random.Random(requests)
        engines = {
            "ours": build(export, requests, overlap="off"),
            "overlapped": build(export, requests, overlap="on"),
            "naive cache": build(export, requests, overlap="off", cache="naive"),
        }
        seconds = {name: [generate(core, requests, rng)] for name, core in engines.items()}
        for _ in range(options.rounds):
            for name, core in engines.items():
                seconds[name].append(generate(core, requests, rng))
        best = {name: min(times) for name, times in seconds.items()}
        found = shares(engines["ours"], requests, options.rounds, rng)
        print(f"{requests:>3} requests: " + ", ".join(f"{k} {v:.2%}" for k, v in found.items()))
        ratios = (
            f"{name} {best['ours'] / best[name]:.3f}" for name in ("overlapped", "naive cache")
        )
        print(f"{'':>14}speed relative to ours: {', '.join(ratios)}", flush=True)
        for core in engines.values():
            core.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
