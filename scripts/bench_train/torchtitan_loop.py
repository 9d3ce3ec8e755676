"""`torchrun -m scripts.bench_train.torchtitan_loop STEPS CORPUS DTYPE RECOMPUTE EP`: torchtitan's
own Trainer on its DeepSeek-V3 debug model, on CPUs over gloo.

A program of its own, because torchtitan 0.3.0 runs on CUDA only and is changed here in four places
before it is built: its device module, the sums of FSDP's reduce-scatter (gloo has no PREMUL_SUM),
a function that torch has from 2.14 on, and SDPA (torchtitan's own class) for FlexAttention, which
has no backward on a CPU. Its batches are windows at random places of the corpus. Rank 0 prints one
JSON line per step.

CORPUS: a .npy of token ids below 2,048, next to its tokenizer.json. DTYPE of FSDP2's mixed
precision: bfloat16 or float32. RECOMPUTE: none or selective.
"""

import json
import os
import resource
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchtitan.tools.utils as titan_utils
from torch import Tensor

LENGTH, BATCH = 256, 8
"""Tokens per sequence, and sequences per step of all ranks."""


def run_on_cpu() -> None:
    """Change what torchtitan takes from CUDA; must precede its other imports."""
    properties = types.SimpleNamespace(total_memory=24 << 30, name="cpu")
    titan_utils.device_type = "cpu"
    titan_utils.device_module = types.SimpleNamespace(
        set_device=lambda device: None, current_device=lambda: 0, device_count=lambda: 1,
        synchronize=lambda *rest: None, get_device_name=lambda device=None: "cpu",
        get_device_properties=lambda device=None: properties,
        reset_peak_memory_stats=lambda *rest: None, empty_cache=lambda: None,
        memory_stats=lambda device=None: {}, memory=torch.cuda.memory, Event=torch.Event,
        current_stream=lambda *rest: None, is_available=lambda: True,
    )  # fmt: skip
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda timeout, group=None: None  # type: ignore[attr-defined]

    import torchtitan.distributed.fsdp as fsdp

    without_division = fsdp.disable_fsdp_gradient_division

    def and_plain_sums(model: torch.nn.Module) -> None:
        without_division(model)
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = and_plain_sums


def trainer_config(steps: int, corpus: Path, dtype: str, recompute: str, ep: int) -> Any:
    """torchtitan's configuration of the debug model with our sizes of a batch."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.optimizer.optimizer import default_adamw
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel

    class Windows(BaseDataLoader):
        """Batches of windows, other ones on each rank."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Config, *, dp_rank: int, local_batch_size: int, **rest: Any):
            self.tokens = torch.from_numpy(np.load(corpus, allow_pickle=False).astype(np.int64))
            self.random = torch.Generator().manual_seed(dp_rank)
            self.size = local_batch_size

        def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            positions = torch.arange(LENGTH).expand(self.size, LENGTH)
            while True:
                last = len(self.tokens) - LENGTH
                starts = torch.randint(0, last, (self.size,), generator=self.random)
                window = torch.stack([self.tokens[s : s + LENGTH + 1] for s in starts])
                yield {"input": window[:, :-1], "positions": positions}, window[:, 1:]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    config = deepseek_v3_debugmodel()
    for layer in config.model_spec.model.layers:
        flex = layer.attention.inner_attention
        assert isinstance(flex, FlexAttention.Config)
        layer.attention.inner_attention = ScaledDotProductAttention.Config(
            param_init=flex.param_init, sharding_config=flex.sharding_config
        )
    config.hf_assets_path = str(corpus.parent)
    config.dataloader = Windows.Config()
    config.training.steps, config.training.seq_len = steps, LENGTH
    config.optimizer, config.lr_scheduler.warmup_steps = default_adamw(lr=3e-3), steps
    config.training.local_batch_size = BATCH // int(os.environ["WORLD_SIZE"])
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = dtype
    config.parallelism.expert_parallel_degree = ep
    config.parallelism.spmd_backend = "partial_dtensor"  # the default needs torch 2.14
    config.activation_checkpoint = SelectiveAC.Config() if recompute == "selective" else None
    config.checkpoint.enable = False
    config.metrics.log_freq = 10**9
    return config


def main(steps: int, corpus: str, dtype: str, recompute: str, ep: int) -> None:
    """Train for `steps` steps; rank 0 prints tokens/s and the peak of its memory at each."""
    run_on_cpu()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = trainer_config(steps, Path(corpus), dtype, recompute, ep)
    with tempfile.TemporaryDirectory() as folder:
        config.dump_folder = folder  # it makes folders there
        _train(config.build())


def _train(trainer: Any) -> None:
    step, forward_backward = trainer.train_step, trainer.forward_backward_step
    losses: list[Tensor] = []

    def kept(*args: Any, **options: Any) -> Tensor:
        losses.append(forward_backward(*args, **options).detach())
        return losses[-1]

    def timed(batches: Any) -> None:
        started = time.perf_counter()
        step(batches)
        speed = BATCH * LENGTH / (time.perf_counter() - started)
        loss = losses[-1].clone()
        torch.distributed.all_reduce(loss)  # each rank's is divided by the tokens of all
        if os.environ["RANK"] == "0":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            record = {
                "step": len(losses), "loss": loss.item(), "tokens_per_s": speed, "memory_gib": peak
            }  # fmt: skip
            print(json.dumps(record), flush=True)

    trainer.train_step, trainer.forward_backward_step = timed, kept
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
