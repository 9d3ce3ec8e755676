"""`python -m scripts.bench_serve.grammar_cost EXPORT`: what structured output costs per step.

Requests generate 64 tokens each, with a JSON schema (an array of texts, whose tokens are all
sampled) and without, in alternating rounds. For 1, 4 and 16 requests at once it prints, of the best
round of each,

- the time of a step without grammars, and with them,
- the time in which the engine waits for the matchers, per step, and
- the time to apply the masks, per step; both also as shares of a step without grammars.

Then it fills in a form, whose keys are forced, with and without jump-forward.
"""

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.command_line import CommandParser
from configs.errors import UserError
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.engine.request import RequestError, SamplingParams, start_grammars
from serve.grammar.mask import apply_masks, n_words
from train.report.environment import cpu_name

TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 100}
_NAMES = ("number of passengers", "number of cars", "year of construction", "total weight")
FORM = {
    "type": "object",
    "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in _NAMES},
    "required": list(_NAMES),
}
_N_TOKENS = 64


class TimedMatchers:
    """Passes `update` on; `seconds` is the time in it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seconds = 0.0

    def update(self, states: Any) -> None:
        begin = time.perf_counter()
        self.inner.update(states)
        self.seconds += time.perf_counter() - begin

    def close(self) -> None:
        self.inner.close()


def generate(core: EngineCore, n: int, seed: int, **more: Any) -> tuple[float, int, int]:
    """Seconds for `n` requests after their prompts, steps, and tokens."""
    rng, vocab = random.Random(seed), core.sampler.n_tokens
    params = SamplingParams(**{"max_tokens": _N_TOKENS, "seed": seed, "ignore_eos": True, **more})
    requests = [
        one
        for _ in range(n)
        for one in core.make_requests([rng.randrange(vocab) for _ in range(16)], params)
    ]
    start_grammars(requests)
    core.scheduler.add(requests)
    core.step()
    if core.grammars is not None and isinstance(core.grammars.matchers, TimedMatchers):
        core.grammars.matchers.seconds = 0.0
    begin, steps = time.perf_counter(), 0
    while core.busy:
        core.step()
        steps += 1
    return time.perf_counter() - begin, steps, sum(request.n_output for request in requests)


def mask_seconds(core: EngineCore, n: int) -> float:
    """To apply the masks of `n` requests."""
    size, best = core.sampler.n_tokens, float("inf")
    random_bits = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (n, n_words(size)))
    masks = random_bits.astype(np.int32)
    logits = torch.randn(n, size)
    for _ in range(50):
        begin = time.perf_counter()
        apply_masks(logits, list(range(n)), masks)
        best = min(best, time.perf_counter() - begin)
    return best


def report_cost(core: EngineCore, n: int, rounds: int) -> None:
    """Print a line for `n` requests."""
    assert core.grammars is not None
    timed = TimedMatchers(core.grammars.matchers)
    core.grammars.matchers = timed  # type: ignore[assignment]
    plain = restricted = waiting = float("inf")
    for seed in range(rounds + 1):  # the first one compiles
        seconds, steps, _ = generate(core, n, seed)
        plain = min(plain, seconds / steps)
        seconds, steps, _ = generate(core, n, seed, json_schema=TEXTS)
        if seed:
            restricted, waiting = (
                min(restricted, seconds / steps),
                min(waiting, timed.seconds / steps),
            )
    core.grammars.matchers = timed.inner
    masks = mask_seconds(core, n)
    print(
        f"{n:>3} requests: step {plain * 1e3:.2f} ms, with grammars {restricted * 1e3:.2f} ms; "
        f"matchers {waiting * 1e6:.0f} us ({waiting / plain:.1%}), "
        f"masks {masks * 1e6:.0f} us ({masks / plain:.1%})",
        flush=True,
    )


def report_jumps(export: Export, n: int, rounds: int) -> None:
    """Print the rates of a form."""
    rates, jumped = {}, 0
    for mode in ("on", "off"):
        core = EngineCore(export, EngineOptions(jump_forward=mode, max_running=n))
        generate(core, n, 0, json_schema=FORM)
        jumped = core.n_jumped
        found = [generate(core, n, seed, json_schema=FORM) for seed in range(1, rounds + 1)]
        rates[mode] = max(tokens / seconds for seconds, _, tokens in found)
        jumped = core.n_jumped - jumped
        if mode == "on":
            share = jumped / sum(tokens for _, _, tokens in found)
        core.close()
    print(
        f"form, {n} requests: {share:.0%} of the tokens jumped; {rates['on']:.0f} tokens/s, "
        f"without jump-forward {rates['off']:.0f}: {rates['on'] / rates['off']:.2f} times"
    )


def main() -> int:
    """Print the costs, then the rates."""
    parser = CommandParser(prog="python -m scripts.bench_serve.grammar_cost", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        export = open_export(options.export, options.dtype, "cpu")
        print(
            f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {options.threads} threads, "
            f"torch {torch.__version__}, {export.dtype}, {export.highest_token + 1} tokens"
        )
        core = EngineCore(export, EngineOptions(max_running=max(options.requests)))
        for n in options.requests:
            report_cost(core, n, options.rounds)
        core.close()
        report_jumps(export, max(options.requests), options.rounds)
    except (UserError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
