"""`python -m scripts.inject_faults.rank FILE.toml ...`: `python -m train` with faults on request.

The trainer itself has no code for faults: this module wraps its step in this process, and looks for
a request (`requests.py`) before every step.
"""

import os
import resource
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from configs.loader import load, parse_arguments
from configs.paths import local_path
from parallel.allocator import restart_without_thread_cache
from parallel.launch_environment import configure_libraries
from scripts.inject_faults.requests import READY, Request, describe, folder_of, receive


class Faults:
    """Wraps the steps of this rank."""

    def __init__(self, run: Path, rank: int) -> None:
        import train.trainer

        self.run, self.rank = run, rank
        self._step = train.trainer.train_step
        self._slow, self._full_until = 0.0, 0
        self._own_s = 0.0

    def step(self, model: Any, optimizer: Any, batches: Any, **named: Any) -> Any:
        """A step, with the requested fault."""
        number = named["step"]
        if self._full_until:
            # also of a process that was started again
            _limit_writers(4096 if number <= self._full_until else None)
            self._full_until *= number <= self._full_until
        request = receive(self.run, self.rank)
        if request is not None:
            line = f"fault on rank {self.rank}: {describe(request)} at step {number}"
            print(line, file=sys.stderr, flush=True)
        with ExitStack() as stack:
            if request is not None:
                self._apply(request, model, number, stack)
            if self._slow:
                stack.enter_context(self._slowed())
            return self._step(model, optimizer, batches, **named)

    def _apply(self, request: Request, model: Any, number: int, stack: ExitStack) -> None:
        import torch
        import torch.distributed as dist

        import train.step
        from parallel.shards import local_of

        first = iter([True])
        if request.kind == "nan":
            losses = train.step.loss_sums

            def poisoned(*arguments: Any) -> Any:
                return losses(*arguments) + (float("nan") if next(first, False) else 0.0)

            stack.enter_context(patch.object(train.step, "loss_sums", poisoned))
        elif request.kind == "nan_gradient":
            norm = train.step.global_grad_norm

            def changed(parameters: Any, rank: int) -> Any:
                shards = [local_of(p.grad) for p in parameters if p.grad is not None]
                next(shard for shard in shards if shard.numel()).view(-1)[0] = float("nan")
                return norm(parameters, rank)

            stack.enter_context(patch.object(train.step, "global_grad_norm", changed))
        elif request.kind == "skip":
            reduce = dist.all_reduce

            def skipped(*arguments: Any, **named: Any) -> Any:
                return None if next(first, False) else reduce(*arguments, **named)

            stack.enter_context(patch.object(dist, "all_reduce", skipped))
        elif request.kind == "slow":
            self._slow = request.amount / 100
        elif request.kind == "disk_full":
            self._full_until = number + max(int(request.amount), 1)
            _limit_writers(4096)
        elif request.kind in ("spike", "flip_weight"):
            shards = [local_of(p.detach()) for p in model.parameters()]
            shard = next(s for s in shards if s.numel()).view(-1)
            if request.kind == "spike":
                shard.mul_(request.amount or 1e3)
            else:
                shard[0:1].view(torch.int32).bitwise_xor_(1 << 12)

    def _slowed(self) -> Any:
        """Make the forward pass of this rank longer by a share of its time."""
        import train.step

        losses, share = train.step.loss_sums, self._slow

        def slow(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = losses(*arguments)
            spent = time.perf_counter() - start
            # the backward pass takes about twice as long
            time.sleep(3 * spent * share)
            return result

        return patch.object(train.step, "loss_sums", slow)


def _limit_writers(n_bytes: int | None) -> None:
    """Limit the size of files that this rank and the process of its checkpoints may write; None for
    no limit."""
    threads = Path("/proc/self/task").iterdir()
    children = [int(n) for thread in threads for n in (thread / "children").read_text().split()]
    for process in (os.getpid(), *children):
        with suppress(ProcessLookupError):
            _, most = resource.prlimit(process, resource.RLIMIT_FSIZE)
            allowed = most if n_bytes is None else n_bytes
            resource.prlimit(process, resource.RLIMIT_FSIZE, (allowed, most))


def main(arguments: list[str]) -> int:
    """Train; returns the exit code of `python -m train`."""
    configure_libraries()
    import train.__main__
    import train.trainer

    file, overrides, _ = parse_arguments(arguments)
    run, rank = local_path(load(file, overrides).run.dir), int(os.environ.get("RANK", "0"))
    place = folder_of(run)
    place.mkdir(parents=True, exist_ok=True)
    (place / READY).touch()
    faults = Faults(run, rank)
    with patch.object(train.trainer, "train_step", faults.step):
        return train.__main__.main(arguments)


if __name__ == "__main__":
    restart_without_thread_cache()
    sys.exit(main(sys.argv[1:]))
