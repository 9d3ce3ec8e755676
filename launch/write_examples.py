"""`python -m launch.write_examples`: the job scripts and manifests in launch/examples."""

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from launch import kubernetes, slurm
from launch.render import CHECKOUT

FOLDER = CHECKOUT / "launch" / "examples"
_SITE = ["--site", "launch/examples/site.toml", "--dry-run"]
_KUBERNETES_SITE = ["--site", "launch/examples/kubernetes_site.toml"]
EXAMPLES = {
    "one_node.sbatch": [
        "configs/qwen3_30b_a3b.toml", "--nodes=1", "--run.dir=/shared/runs/qwen3_30b",
        "--parallel.dp_replicate=1", "--parallel.dp_shard=-1", "--parallel.ep=8",
    ],
    "sixteen_nodes.sbatch": [
        "configs/qwen3_235b_a22b.toml", "--nodes=16", "--run.dir=/shared/runs/qwen3_235b",
        "--parallel.dp_replicate=1", "--parallel.dp_shard=-1", "--parallel.ep=8",
        "--time=2-00:00:00", "--jobs=4",
    ],
    "128_nodes.sbatch": [
        "configs/deepseek_v3_671b.toml", "--nodes=128", "--run.dir=/shared/runs/v3",
        "--parallel.dp_replicate=4", "--parallel.dp_shard=-1", "--parallel.ep=64",
        "--time=7-00:00:00",
    ],
    "sweep.sbatch": [
        "sweep", "configs/qwen3_30b_a3b.toml", "--nodes=2", "--set=optimizer.lr=1e-4,3e-4",
        "--set=parallel.ep=4,8,16", "--parallel.dp_replicate=1", "--parallel.dp_shard=-1",
        "--run.dir=/shared/runs/sweep",
    ],
    "serving.sbatch": [
        "serve", "/shared/runs/qwen3_235b/export", "--nodes=4", "--nodes-per-engine=2", "--tp=8",
        "--ep=16", "--run=/shared/runs/serving",
    ],
    "jobset.yaml": [
        "configs/qwen3_30b_a3b.toml", "--nodes=2", "--run.dir=/shared/runs/qwen3_30b",
        "--data.cache_dir=/shared/cache", "--parallel.dp_replicate=1", "--parallel.dp_shard=-1",
        "--parallel.ep=8",
    ],
}  # fmt: skip
"""Arguments per file: of `python -m launch.kubernetes` for a manifest, else of `launch.slurm`."""


def example(name: str) -> str:
    """The text of an example. The checkout is `/shared/phalanx` in it, whatever its place here."""
    printed = io.StringIO()
    before = Path.cwd()
    os.chdir(CHECKOUT)
    try:
        with redirect_stdout(printed):
            if name.endswith(".yaml"):
                code = kubernetes.main([*EXAMPLES[name], *_KUBERNETES_SITE])
            else:
                code = slurm.main([*EXAMPLES[name], *_SITE])
    finally:
        os.chdir(before)
    if code:
        raise RuntimeError(f"{name}: exit code {code}")
    return printed.getvalue().replace(str(CHECKOUT), "/shared/phalanx")


def main() -> int:
    """Write all examples."""
    for name in EXAMPLES:
        (FOLDER / name).write_text(example(name))
        print(f"wrote launch/examples/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
