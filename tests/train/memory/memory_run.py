"""Two steps of each case under torch's memory tracker, on the started number of ranks.

Started as `torchrun ... memory_run.py FOLDER CASES.json`. The peak memory of every rank is written
to `FOLDER/measured.json`, in bytes by name of the case. The second step counts, because AdamW has
its moments then.
"""

import json
import sys
from pathlib import Path
from typing import Any

from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from configs.loader import from_dict
from configs.schema import JobConfig
from kernels.layers.attention_cpu import SHORT
from models.router import routers
from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from tests.parallel.mesh.mesh_run import random_corpus
from train.build import build_training
from train.data.batches import shuffled_epochs
from train.dataset.sequences import sequences_of
from train.step import train_step


class Tracker(FSDPMemTracker):
    """Torch's tracker, but FSDP2's hooks are called only when FSDP2 calls them, not after a module
    in which recomputation ended early; and it keeps no tensor alive."""

    def _fsdp_param_group_post_backward(self, module: Any, post_backward: Any) -> Any:
        """Torch's wrapper would keep the last gradient of a group alive while they are reduced,
        which does not happen in training. Its only purpose is to name allocations meanwhile."""
        return post_backward

    def _instrument_fsdp_module(self) -> None:
        super()._instrument_fsdp_module()
        for module in self._root_mod.modules():
            module._forward_hooks_always_called.clear()


def largest(config: JobConfig, ranks: Ranks, one_choice: bool) -> int:
    """Peak bytes of two steps.

    one_choice: all tokens choose the same experts.
    """
    training = build_training(config, ranks)
    model, optimizer = training.model, training.optimizer
    parallel_dims, fp8_weights = training.mesh.parallel_dims, training.fp8_weights
    for router in routers(model):
        if one_choice:
            router.bias_E[: router.config.top_k] = 100.0  # scores are at most 1
    accumulation = training.accumulation
    fp8_weights.refresh()
    # predicted for documents as long as the sequence; in long sequences shorter ones need less
    eot = 0 if config.data.seq_len <= SHORT else -1
    data = shuffled_epochs(
        sequences_of(random_corpus(config.model.vocab_size, 100_000), config.data.seq_len, eot),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=parallel_dims.data_rank(ranks.rank),
        n_ranks=parallel_dims.data_ranks,
    )
    tracker = Tracker(model, optimizer)

    def forget() -> bool:
        """Called before every microbatch, because the tracker supports one forward pass of each
        module."""
        tracker.reset_mod_stats()
        return False

    with tracker:
        for step in (1, 2):
            batches = list(data.step(step))
            # the first creates the moments of AdamW, for which one microbatch is enough
            train_step(
                model, optimizer, batches[:1] if step == 1 else batches, step=step, rank=ranks.rank,
                tp_size=parallel_dims.tp, clip_norm=1.0, mtp_weight=config.train.mtp_weight,
                stop=forget, updated=fp8_weights.refresh, accumulation=accumulation,
            )  # fmt: skip
    snapshot = tracker.get_tracker_snapshot("peak")
    return sum(device["Total"] for device in snapshot.values())


def main(folder: Path, cases: Path) -> None:
    ranks = start_ranks(threads=1)
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        config = from_dict(case["settings"], name)
        found[name] = gather_json(largest(config, ranks, case["one_choice"]))
    if ranks.is_first:
        (folder / "measured.json").write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
