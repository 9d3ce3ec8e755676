"""`python -m scripts.bench_serve.grammar_cost EXPORT`: what structured output costs per step.

Requests generate 64 tokens each, with a JSON schema (an array of texts, whose tokens are all
sampled) and without, in alternating rounds. For 1, 16 and 64 requests at once it prints, of the
best rounds and per step:

- the processor time of a step without grammars,
- what grammars add in the engine's process: messages and masks,
- the processor time of the process of the matchers, which computes during the forward pass,
- how much longer a step with grammars takes, which needs a core more than `--threads`.

Then it fills in a form, whose keys are forced, with and without jump-forward. Linux only.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.command_line import CommandParser
from configs.errors import UserError
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.engine.request import RequestError, SamplingParams, start_grammars
from serve.grammar.mask import apply_masks
from serve.grammar.matcher import GrammarState
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
    """Passes calls on; `cpu` is their processor time in this process."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.cpu = 0.0

    def update(self, states: Any) -> None:
        self._timed(self.inner.update, states)

    def begin(self, states: Any) -> None:
        self._timed(self.inner.begin, states)

    def finish(self) -> None:
        self._timed(self.inner.finish)

    def _timed(self, call: Callable[..., None], *arguments: Any) -> None:
        begin = time.thread_time()
        call(*arguments)
        self.cpu += time.thread_time() - begin

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Run:
    """Some requests after their prompts; times in seconds."""

    steps: int
    tokens: int
    seconds: float
    cpu: float
    """Processor time of this process."""
    messages: float
    """Processor time of the exchange with the matchers, in this process."""
    matching: float
    """Processor time of their process."""

    def per_step(self, name: str) -> float:
        """Microseconds."""
        found: float = getattr(self, name) / self.steps * 1e6
        return found


def matchers_cpu(core: EngineCore) -> float:
    """Processor time of the process of the matchers so far, 0 without one."""
    worker = core.grammars and core.grammars.worker._process
    if not worker:
        return 0.0
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    stats = [Path(f"/proc/{pid}/schedstat").read_text().split()[0] for pid in children]
    return sum(map(int, stats)) / 1e9


def generate(core: EngineCore, n: int, seed: int, **more: Any) -> Run:
    """`n` requests of 64 tokens."""
    rng, vocab = random.Random(seed), core.sampler.n_tokens
    params = SamplingParams(
        **{"max_tokens": _N_TOKENS, "seed": seed, "ignore_eos": not more, **more}
    )
    requests = [
        one
        for _ in range(n)
        for one in core.make_requests([rng.randrange(vocab) for _ in range(16)], params)
    ]
    start_grammars(requests)
    core.scheduler.add(requests)
    core.step()
    timed = core.grammars and core.grammars.matchers
    assert isinstance(timed, TimedMatchers)
    timed.cpu = 0.0
    begin, cpu, others, steps = time.perf_counter(), time.process_time(), matchers_cpu(core), 0
    while core.busy:
        core.step()
        steps += 1
    return Run(
        steps=steps,
        tokens=sum(request.n_output for request in requests),
        seconds=time.perf_counter() - begin,
        cpu=time.process_time() - cpu,
        messages=timed.cpu,
        matching=matchers_cpu(core) - others,
    )


def build(export: Export, **options: Any) -> EngineCore:
    """An engine whose matchers are timed."""
    core = EngineCore(export, EngineOptions(**options))
    assert core.grammars is not None
    core.grammars.matchers = TimedMatchers(core.grammars.matchers)  # type: ignore[assignment]
    return core


def mask_seconds(core: EngineCore, n: int) -> float:
    """To apply the masks of `n` requests, each inside a text of the schema."""
    spec = SamplingParams(json_schema=TEXTS).grammar_spec()
    assert core.grammars is not None and spec is not None
    state, best = GrammarState(core.grammars.compile(spec).result()), float("inf")
    for token in core.encode('["a', False):
        state.accept(token)
    core.grammars.matchers.update([state])
    assert state.mask is not None and state.error is None
    masks, logits = np.stack([state.mask] * n), torch.randn(n, core.sampler.n_tokens)
    for _ in range(50):
        begin = time.perf_counter()
        apply_masks(logits, list(range(n)), masks)
        best = min(best, time.perf_counter() - begin)
    return best


def report_cost(core: EngineCore, n: int, rounds: int) -> None:
    """Print a line for `n` requests."""
    plain, restricted = [], []
    for seed in range(rounds + 1):
        plain.append(generate(core, n, seed))
        restricted.append(generate(core, n, seed, json_schema=TEXTS))
    restricted = restricted[1:]  # the first one compiles
    cpu = min(run.per_step("cpu") for run in plain)
    messages = min(run.per_step("messages") for run in restricted)
    matching = min(run.per_step("matching") for run in restricted)
    times = [min(run.per_step("seconds") for run in runs) for runs in (restricted, plain)]
    masks = mask_seconds(core, n) * 1e6
    print(
        f"{n:>3} requests: step {cpu:.0f} us of processor time; messages {messages:.0f} and masks "
        f"{masks:.0f} us: {(messages + masks) / cpu:.1%}; process of the matchers {matching:.0f} "
        f"us: {(messages + masks + matching) / cpu:.1%} with it; a step takes "
        f"{times[0] / times[1]:.3f} times as long",
        flush=True,
    )


def report_jumps(export: Export, n: int, rounds: int) -> None:
    """Print the processor time of a form, and the tokens jumped over."""
    cores = {mode: build(export, jump_forward=mode, max_running=n) for mode in ("on", "off")}
    best = dict.fromkeys(cores, float("inf"))
    for seed in range(rounds + 1):
        for mode, core in cores.items():
            before = core.n_jumped
            run = generate(core, n, seed, json_schema=FORM)
            if mode == "on":
                share = (core.n_jumped - before) / run.tokens
            if seed:
                best[mode] = min(best[mode], run.cpu / run.tokens)
    print(
        f"form, {n} requests: {share:.0%} of the tokens jumped; processor time per token "
        f"{best['on'] * 1e6:.0f} us, without jump-forward {best['off'] * 1e6:.0f} us: "
        f"{best['off'] / best['on']:.2f} times"
    )
    for core in cores.values():
        core.close()


def main() -> int:
    """Print the costs, then the rates."""
    parser = CommandParser(prog="python -m scripts.bench_serve.grammar_cost", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        export = open_export(options.export, options.dtype, "cpu")
        print(
            f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {options.threads} threads, "
            f"torch {torch.__version__}, {export.dtype}, {export.highest_token + 1} tokens"
        )
        core = build(export, max_running=max(options.requests))
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
