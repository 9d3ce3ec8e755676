"""Fixture folders of every supported Hugging Face architecture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, write
from tests.models.hf.transformers_peer import DENSE, SEVEN, transformers


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every supported architecture, without RoPE scaling."""
    made = {}
    for name in SEVEN:
        made[name] = tmp_path_factory.mktemp(name)
        model = FAMILIES[name]
        plain = replace(model.rope, scaling="none", factor=1.0, original_length=0, mscale=0.0,
                        mscale_all_dim=0.0, truncate=True)  # fmt: skip
        write(random_decoder(replace(model, rope=plain)), made[name], 10**9)
    for name in DENSE:
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = getattr(transformers(), name)(
            vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
            max_position_embeddings=64, sliding_window=None,
        )  # fmt: skip
        transformers().AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made
