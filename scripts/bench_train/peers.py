"""The peers of `scripts.bench_train`: the command of each, and the trainer's arguments for the same
model, batch and number of cores."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WARMUP = 5
"""Steps of every run that are not counted."""
DEMO, DEEPSEEK = "configs/demo.toml", "configs/tiny/deepseek_v3.toml"
_NO_PAUSES = [
    "--checkpoint.keep=1", "--checkpoint.every=0", "--validation.every=0",
    "--validation.sequences=1",
]  # fmt: skip
_LEARNING_RATE = ["--optimizer.lr=3e-3", "--schedule.warmup_fraction=1"]
"""As in each peer's loop: the rate rises to its peak at the last step."""
_PLAIN = [
    "--model.attention.n_kv_heads=8", "--model.attention.qk_norm=none",
    "--model.moe.n_shared_experts=0", "--model.moe.score_func=softmax",
]  # fmt: skip
_QWEN3 = ["--model.moe.n_shared_experts=0", "--model.moe.score_func=softmax",
          "--model.moe.bias_update_rate=0", "--model.moe.global_aux_loss_coef=0.001"]  # fmt: skip
_DEBUG_MODEL = [
    "--data.seq_len=256", "--train.global_batch=8",
    "--train.mtp_weight=0", "--parallel.reshard_after_forward=false", "--model.mtp_depth=0",
    "--model.attention.q_lora_rank=0", "--model.moe.n_groups=1", "--model.moe.top_groups=1",
    "--model.moe.route_scale=1.0", "--model.moe.seq_aux_loss_coef=0",
    "--model.vocab_size=2048", "--model.d_model=256", "--model.n_layers=6",
    "--model.n_dense_layers=1", "--model.d_ff=1024",
    "--model.norm_eps=1e-6", "--model.attention.n_heads=16",
    "--model.attention.kv_lora_rank=512", "--model.attention.qk_nope_head_dim=128",
    "--model.attention.qk_rope_head_dim=64", "--model.attention.v_head_dim=128",
    "--model.rope.scaling=yarn", "--model.rope.factor=40.0",
    "--model.rope.original_length=4096", "--model.rope.mscale=0.7",
    "--model.rope.mscale_all_dim=0.7", "--model.moe.n_experts=8", "--model.moe.top_k=3",
    "--model.moe.d_expert=256", "--model.moe.n_shared_experts=2", "--model.moe.norm_top_k=false",
    "--model.moe.score_func=softmax", "--model.moe.bias_update_rate=0.001",
]  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """One comparison: `command` is the peer's, with `{steps}`, `{corpus}` and `{dtype}`; the
    trainer gets `experiment` and `arguments`. Both get two cores: as threads of one process or as
    ranks of one thread."""

    name: str
    command: list[str]
    threads: int
    arguments: list[str]
    experiment: str = DEMO


def _titan(name: str, recompute: str, ep: int) -> Peer:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    loop = [
        "scripts.bench_train.torchtitan_loop",
        "{steps}",
        "{corpus}",
        "{dtype}",
        recompute,
        str(ep),
    ]
    ours = [*_DEBUG_MODEL, f"--parallel.ep={ep}", f"--parallel.recompute={recompute}"]
    return Peer(name, [*ranks, *loop], 1, ours, DEEPSEEK)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "plain",
            ["-m", "scripts.bench_train.plain_loop", "{steps}", "{corpus}", "{dtype}"],
            2,
            _PLAIN,
        ),
        Peer(
            "transformers",
            ["-m", "scripts.bench_train.transformers_loop", "{steps}", "{corpus}", "{dtype}"],
            2,
            _QWEN3,
        ),
        _titan("torchtitan", "none", 2),
        _titan("torchtitan-selective", "selective", 2),
        _titan("torchtitan-fsdp", "none", 1),
        _titan("torchtitan-fsdp-selective", "selective", 1),
    )
}


@dataclass(frozen=True)
class Result:
    """Median tokens/s, greatest resident memory of rank 0 in GiB, first and last loss."""

    tokens_per_s: float
    memory_gib: float
    losses: tuple[float, float]


def run_peer(peer: Peer, steps: int, corpus: Path, dtype: str) -> Result:
    """dtype: of its products, bfloat16 or float32. Raises CalledProcessError."""
    words = [word.format(steps=steps, corpus=corpus, dtype=dtype) for word in peer.command]
    lines = _run(words, peer.threads).splitlines()
    return _result([json.loads(line) for line in lines if line.startswith('{"step"')], WARMUP)


def run_trainer(
    experiment: str, arguments: Sequence[str], steps: int,
    ranks: int = 2, threads: int = 1, warmup: int = WARMUP,
) -> Result:  # fmt: skip
    """A run of the trainer.

    Args:
        experiment: A TOML file.
        arguments: Overrides of its settings.
        steps: Number of steps.
        ranks: Number of processes.
        threads: Of each rank.
        warmup: Steps that are not counted.

    Raises CalledProcessError.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*(command if ranks > 1 else []), "-m", "train", experiment]
        command += [*_NO_PAUSES, *_LEARNING_RATE, *arguments]
        command += [f"--run.dir={folder}/run", f"--train.steps={steps}"]
        _run([*command, f"--train.threads={threads}"], threads)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        records = [record for line in lines if "loss" in (record := json.loads(line))]
        return _result(records, warmup)


def _run(words: list[str], threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, stderr=done.stderr[-2000:])
    return done.stdout


def _result(records: list[dict[str, float]], warmup: int) -> Result:
    return Result(
        statistics.median(record["tokens_per_s"] for record in records[warmup:]),
        max(record["memory_gib"] for record in records),
        (records[0]["loss"], statistics.fmean(r["loss"] for r in records[-5:])),
    )
