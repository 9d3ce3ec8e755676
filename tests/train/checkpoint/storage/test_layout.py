"""Files laid out by hand are those that the safetensors library reads, and would write."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from models.layers.box import Box
from train.checkpoint.saving import DTYPES, part_of, write_part
from train.checkpoint.storage.layout import ITEM_BYTES, file_layout
from train.checkpoint.storage.local import LocalStorage


def test_every_dtype_is_in_both_tables() -> None:
    for dtype, name in DTYPES.items():
        assert ITEM_BYTES[name] == dtype.itemsize


@pytest.mark.parametrize("seed", range(20))
def test_random_files_are_read_by_the_library(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {}
    for i in range(rng.randint(1, 12)):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 3)))
        dtype = rng.choice([*DTYPES])
        tensor = torch.randint(0, 2, shape).to(dtype)
        if tensor.dim() == 2 and rng.random() < 0.5:
            tensor = tensor.t()
        tensors[rng.choice(["a", "layer.", 'quote"', "ü", " "]) + str(i)] = tensor
    boxes = {name: (Box.all_of(t.shape), t.dtype) for name, t in tensors.items()}
    part = part_of("x.safetensors", boxes)
    (tmp_path / "folder").mkdir()
    write_part(LocalStorage(tmp_path), "folder", part, tensors)
    path = tmp_path / "folder" / "x.safetensors"
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    whole = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert path.stat().st_size == part.layout.size == len(whole)


def test_tensors_are_aligned() -> None:
    layout = file_layout({"b": ("BF16", (3,)), "a": ("U8", (5,)), "w": ("F32", (1,))})
    assert [*layout.places] == ["w", "b", "a"] and len(layout.header) % 8 == 0
    assert layout.size == len(layout.header) + 4 + 6 + 5
