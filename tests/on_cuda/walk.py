"""`python -m tests.on_cuda.walk [NAME ...]`: training steps and steps of the server on CUDA without
CUDA; prints for every case, as a line of JSON, what ran, where the host waited, and the fault.

A walk is the second training step as `--check` traces it: forward, backward, clipping, optimizer,
FP8 weights; the first rank of a group whose other ranks do not exist.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import train.memory
from configs.errors import ConfigError
from configs.loader import load
from configs.parallel_dims import resolve
from models.decoder import Decoder
from models.router import routers
from parallel.memory.fake_group import fake_group
from serve.cache.kv_cache import KvCache
from serve.cuda.runner import CudaRunner
from serve.engine.batch import lay_out
from tests.on_cuda.device import CUDA, CudaTracker, cuda_without_cuda
from tests.on_cuda.launches import checked_launches

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = (
    "--data.seq_len=128", "--train.micro_batch=2", "--train.steps=1", "--schedule.warmup_steps=0",
)  # fmt: skip
FAMILIES = sorted(path.stem for path in (CONFIGS / "tiny").glob("*.toml"))
TRUE_SIZES = ("qwen3_30b_a3b", "deepseek_v3_671b", "mixtral_8x7b", "gpt_oss_20b")
DISPATCH = {
    "": (), "sync_free": ("--parallel.dispatch.kind=sync_free",),
    "hierarchical": ("--parallel.dispatch.kind=hierarchical", "--parallel.dispatch.node_size=2"),
    "fp8 rows": tuple(f"--parallel.dispatch.{x}_dtype=fp8" for x in ("dispatch", "combine_grad")),
    "chunks": ("--parallel.dispatch.chunks=2",),
}  # fmt: skip
RECOMPUTE = {
    "": (), "full": ("--parallel.recompute=full",),
    "selective": ("--parallel.recompute=selective",),
    "swiglu": ("--parallel.recompute_swiglu=true",),
}  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """What to run."""

    experiment: str
    """File in `configs`, without its ending."""
    recipe: str = "bf16"
    ranks: int = 1
    settings: tuple[str, ...] = ()
    compiles: bool = False
    serves: bool = False

    @property
    def name(self) -> str:
        """For a reader, and for the command line."""
        words = [x.rsplit(".", 1)[-1].lstrip("-") for x in self.settings]
        kind = "serve" if self.serves else f"{self.recipe} {self.ranks} ranks"
        return " ".join([self.experiment, kind, *words])


@dataclass
class Walked:
    """What ran."""

    name: str
    fault: str = ""
    refused: str = ""
    """Why there is no such training."""
    place: list[str] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)
    """Waits of the host by place."""
    operators: dict[str, int] = field(default_factory=dict)
    launched: dict[str, int] = field(default_factory=dict)
    spilled: list[str] = field(default_factory=list)
    cpu_s: float = 0.0


def few() -> list[Walk]:
    """The walks of the default run."""
    return [
        Walk("tiny/qwen3"),
        Walk("tiny/deepseek_v3", "fp8_blockwise", 4, ("--parallel.ep=4", *RECOMPUTE["full"])),
        Walk("tiny/gpt_oss", "bf16", 2, ("--parallel.ep=2", *DISPATCH["sync_free"])),
        Walk("tiny/qwen3", serves=True),
    ]


def every() -> Iterator[Walk]:
    """The complete list."""
    recipes = ("bf16", "fp8_blockwise")
    for recipe in recipes:
        for family in FAMILIES:
            yield Walk(f"tiny/{family}", recipe)
            yield Walk(f"tiny/{family}", recipe, 4, ("--parallel.ep=2", "--parallel.tp=2"))
        for kind, dispatch in DISPATCH.items():
            for recompute in RECOMPUTE.values():
                n = 4 if kind == "hierarchical" else 2
                settings = (f"--parallel.ep={n}", *dispatch, *recompute)
                yield Walk("tiny/deepseek_v3", recipe, 8, settings)
        for n, settings in (
            (2, ("--parallel.tp=2",)), (4, ("--parallel.dp_replicate=2",)),
            (4, ("--parallel.etp=2", "--parallel.tp=2")), (2, ("--parallel.zero_stage=1",)),
        ):  # fmt: skip
            yield Walk("tiny/qwen3", recipe, n, settings)
        for experiment in TRUE_SIZES:
            mesh = ("--parallel.dp_replicate=1", "--parallel.dp_shard=8", "--parallel.ep=8")
            yield Walk(experiment, recipe, 8, mesh, compiles=True)
    for experiment in (*(f"tiny/{family}" for family in FAMILIES), *TRUE_SIZES):
        yield Walk(experiment, serves=True)


def run(walk: Walk, within: Callable[[], Any] = nullcontext) -> Walked:
    """Run one; a fault is part of the result. within: a context around it, for mutations."""
    done, start = Walked(walk.name), time.process_time()
    with cuda_without_cuda(), checked_launches(walk.compiles) as (launched, builds):
        tracker = CudaTracker()
        with patch("parallel.memory.model.MemoryTracker", lambda _: tracker):
            try:
                with within():
                    (_serve if walk.serves else _train)(walk, tracker)
            except ConfigError as error:
                done.refused = str(error)
            except Exception as error:  # a fault is the result
                done.fault = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                done.place = [
                    f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
                    for frame in traceback.extract_tb(error.__traceback__)
                    if "site-packages" not in frame.filename
                ][-6:]
        done.reads, done.operators = dict(tracker.reads), dict(tracker.operators)
        done.launched = dict(launched)
    done.spilled = [build.name for build in builds if build.spilled]
    done.cpu_s = time.process_time() - start
    return done


def _train(walk: Walk, tracker: CudaTracker) -> None:
    changes = [f"--precision.recipe={walk.recipe}", *SMALL, *walk.settings]
    if walk.experiment.startswith("tiny/"):
        changes.append("--model.vocab_size=320")
    config = load(CONFIGS / f"{walk.experiment}.toml", [*changes, *_batch(walk)])
    dims = resolve(config, walk.ranks)
    config = train.memory._traceable(config, dims)
    compute = torch.bfloat16
    with fake_group(dims.world + 1), patch.object(train.memory, "chosen", lambda _: nullcontext()):
        step = train.memory._Step(config, dims, "cuda", compute)
        tracker.reads.clear()
        step.evenly()


def _batch(walk: Walk) -> list[str]:
    return [f"--train.global_batch={4 * walk.ranks}"]


def _serve(walk: Walk, tracker: CudaTracker) -> None:
    """A prompt in two chunks beside a decode, then a decode step as a graph."""
    is_tiny = walk.experiment.startswith("tiny/")
    changes = ["--model.vocab_size=320"] if is_tiny else ["--model.n_layers=4"]
    config = load(CONFIGS / f"{walk.experiment}.toml", [*changes, "--model.mtp_depth=0"]).model
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16).eval()
    for router in routers(model):
        router.float_bias()
    with tracker, torch.inference_mode(), graphs():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    given = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                    module._parameters[name] = torch.nn.Parameter(given, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.zeros_like(buffer, device=CUDA)
        cache = KvCache(config, 40, 16, torch.bfloat16, CUDA)
        runner = CudaRunner(model, cache, 4, 8)
        tracker.reads.clear()
        pages = [list(range(1 + 7 * b, 8 + 7 * b)) for b in range(3)]
        for rows in ([(40, 0), (1, 60)], [(30, 40), (1, 61)], [(1, 70), (1, 62), (1, 5)]):
            chunks = [([1] * n, start, pages[b]) for b, (n, start) in enumerate(rows)]
            chunks.sort(key=lambda chunk: len(chunk[0]) > 1)
            runner.run(lay_out(chunks, 16, range(len(rows))))


@contextmanager
def graphs() -> Iterator[None]:
    """Graphs are captured by running, and replayed by doing nothing."""

    class Graph:
        def pool(self) -> int:
            return 0

        def replay(self) -> None:
            return None

    with (
        patch.object(torch.cuda, "CUDAGraph", Graph),
        patch.object(torch.cuda, "graph", lambda *_, **__: nullcontext()),
    ):
        yield


def main() -> None:
    """Run the walks whose names contain one of the given texts, by default the few."""
    words = sys.argv[1:]
    walks = few() if not words else [w for w in every() if any(x in w.name for x in words)]
    if words == ["all"]:
        walks = [*every()]
    for walk in walks:
        print(json.dumps(run(walk).__dict__), flush=True)


if __name__ == "__main__":
    main()
