"""A small source for tests of the corpus, and a config that uses it."""

import random
from pathlib import Path
from typing import Any

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from configs.schema import DataConfig, JobConfig, OptimizerConfig, RunConfig, TrainConfig


def silent(line: str) -> None:
    pass


def config(tmp_path: Path, vocab_size: int = 300, **data: Any) -> JobConfig:
    settings = {"source": str(tmp_path / "docs"), "cache_dir": str(tmp_path / "cache")} | data
    moe = MoEConfig(n_experts=2, top_k=1, d_expert=8, norm_top_k=False)
    sizes = {"d_model": 8, "n_layers": 1, "attention": AttentionConfig(n_heads=1, head_dim=8)}
    return JobConfig(
        run=RunConfig(dir="unused"),
        model=ModelConfig(vocab_size=vocab_size, moe=moe, **sizes),  # type: ignore[arg-type]
        train=TrainConfig(steps=1, global_batch=1, micro_batch=1),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(**settings),
    )


def write_texts(tmp_path: Path) -> list[str]:
    """Forty different documents under `docs`, one with non-ASCII text and one with a forged
    end-of-text token."""
    rng = random.Random(0)
    made = [
        "".join(f"value_{rng.randrange(50)} = {rng.random()}\n" for _ in range(30))
        for _ in range(40)
    ]
    made[3] += "café 数\n"
    made[4] += "x <|endoftext|> y\n"
    (tmp_path / "docs").mkdir()
    for number, text in enumerate(made):
        (tmp_path / "docs" / f"{number}.py").write_text(text)
    return made
