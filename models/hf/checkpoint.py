"""Converts the weights of a Hugging Face folder to ours, from any supported layout and precision.

All names, shapes and dtypes are compared with the model before memory of their size is allocated.
Then rows of our tensors are filled piece by piece, so that a reader holds only its own result and
a piece of at most PIECE_BYTES. Every element that was read is counted, because a typical converter
bug silently loses experts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from models.hf.config.undetermined_settings import KEY
from models.hf.copies import same_rows
from models.hf.folder import RawTensor, raw_tensors
from models.hf.messages import located, named, one_line, shown
from models.hf.quantized import (
    GROUP,
    Quantization,
    dequantize_fp8,
    dequantize_mxfp4,
    quantization_of,
    scale_shape,
)
from models.hf.safetensors_files import MappedFiles
from models.hf.table import LLAMA4_WITH_IMAGES, hf_tensors, text_config
from models.hf.tensors import HfTensor
from models.layers.box import Box

PIECE_BYTES = 2**26
"""Maximum number of bytes, in fp32, that are read from a file at a time (at least one row)."""
_PLAIN = ("F32", "F16", "BF16")
_SCALE_DTYPES = ["F32", "BF16", "F8_E8M0"]


@dataclass(frozen=True)
class _Stored:
    """A tensor and, if it is quantized, its factors."""

    data: RawTensor
    scale: RawTensor | None
    shape: tuple[int, ...]


class HFCheckpoint:
    """An opened folder. `fill` copies rows of one of our tensors from it."""

    def __init__(self, folder: Path, model: ModelConfig, raw: dict[str, Any]) -> None:
        """model, raw: from `models.hf.files.read_config`. UserError: one line, what is wrong."""
        self.folder = folder
        self._files = MappedFiles()
        text = text_config(raw, str(folder / "config.json"))
        self._quantization = quantization_of(text, str(folder / "config.json"))
        found, left_out = raw_tensors(folder, self._files)
        self.left_out: Counter[str] = Counter(dict.fromkeys(left_out, 1))
        """Contents of the folder that the model does not use, with the number of tensors of
        each."""
        if raw.get("architectures") == [LLAMA4_WITH_IMAGES]:
            found = self._language_model(found)
        self._stored = self._pair_with_scales(found)
        first_mtp = f"model.layers.{model.n_layers}."
        if model.mtp_depth and not any(name.startswith(first_mtp) for name in self._stored):
            model = replace(model, mtp_depth=0)  # transformers, for one, drops the modules
            self.left_out["config.json's multi-token prediction, which has no weights"] += 1
        self.model = model
        """The model of config.json, without MTP modules if the folder has none."""
        tensors = list(hf_tensors(model, self._stored))
        self.tensors = [t for t in tensors if not t.is_copy]
        whole = {t.ours: t.name for t in self.tensors if not t.index}
        self._copies = {t.name: whole[t.ours] for t in tensors if t.is_copy}
        self._twins: dict[str, str] = {}
        """Names of tensors that must equal another, with the name of the other."""
        self._check_names(model, text)
        self._by_ours: dict[str, list[HfTensor]] = {}
        for t in self.tensors:
            self._check(t)
            if t.ours is not None:
                self._by_ours.setdefault(t.ours, []).append(t)
        for name, of in self._twins.items():
            self._check_copy(name, of)
        self._taken: Counter[str] = Counter()

    def __contains__(self, ours: str) -> bool:
        return ours in self._by_ours

    def fill(
        self, ours: str, out: Tensor, box: Box | None = None, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """Copy our tensor, or a box of it, into `out`, of any dtype and device.

        piece_bytes: maximum number of bytes, in fp32, read at a time (at least one row).
        """
        box = box or Box.all_of(out.shape)
        for t in self._by_ours[ours]:
            inner = box.at(t.index)
            if inner is not None:
                self._copy(t, out[_within(t, box)], inner, piece_bytes)

    def is_fp8(self, ours: str, block: int) -> bool:
        """Whether all of our tensor is stored as matrices of E4M3 with factors per block x block,
        none of them permuted."""
        return (
            ours in self._by_ours
            and self._quantization.method == "fp8"
            and self._quantization.block == (block, block)
            and all(
                self._stored[t.name].scale is not None and not t.permute and len(t.shape) == 2
                for t in self._by_ours[ours]
            )
        )

    def fill_fp8(self, ours: str, data: Tensor, scales: Tensor, box: Box) -> None:
        """Copy a box of our tensor, for which `is_fp8` is true, as it is stored: E4M3 and fp32
        factors. It starts and ends at blocks of its matrices. If ours is several matrices, the
        factors have the same leading dimensions."""
        block = self._quantization.block
        for t in self._by_ours[ours]:
            stored, inner = self._stored[t.name], box.at(t.index)
            if inner is None:
                continue
            assert stored.scale is not None
            index, cut = _within(t, box), inner.slices()
            data[index] = self._slice(stored.data, *cut)
            blocks = [slice(c.start // n, -(-c.stop // n)) for c, n in zip(cut, block, strict=True)]
            scales[index] = self._slice(stored.scale, *blocks).float()
            wrong = not scales[index].isfinite().all() or data[index].float().isnan().any()
            if wrong:
                raise UserError(f"{located(stored.data.path)}: {t.name} holds inf or NaN")
            self._taken[t.name] += inner.numel

    def factors(self, ours: str) -> Iterator[Tensor]:
        """The factors of all matrices of our tensor, for which `is_fp8` is true."""
        for t in self._by_ours[ours]:
            scale = self._stored[t.name].scale
            assert scale is not None
            yield self._slice(scale, slice(0, scale.shape[0])).float()

    def check_complete(self, boxes: Mapping[str, Box] | None = None) -> None:
        """Check that every element was read once, and that tensors which the model lacks are
        zero.

        boxes: the part of our tensors that was to be read, by name; of the others it is all.
        """
        boxes = boxes or {}
        for name, box in boxes.items():
            stored = sum(math.prod(t.shape) for t in self._by_ours[name])
            assert stored == math.prod(box.whole), f"{name} is {box.whole}"
        for t in self.tensors:
            if t.ours is None:
                self._check_zero(t)
                continue
            due = math.prod(t.shape)
            if t.ours in boxes:
                inner = boxes[t.ours].at(t.index)
                due = 0 if inner is None else inner.numel
            assert self._taken[t.name] == due, f"{t.name} was not read in full"

    def _check_zero(self, t: HfTensor) -> None:
        """For architectures with a shared expert that the model does not have."""
        rows = max(1, PIECE_BYTES // max(4 * math.prod(t.shape[1:]), 1))
        for a in range(0, t.shape[0], rows):
            if self._rows(self._stored[t.name], a, min(a + rows, t.shape[0])).any():
                raise UserError(
                    f"{self._stored[t.name].data.path}: {t.name} is not zero, though {KEY} in "
                    "config.json says that the model has no such expert; remove it there"
                )

    def _copy(self, t: HfTensor, part: Tensor, box: Box, piece_bytes: int) -> None:
        """Fill `part`, which is `box` of `ours[t.index]`, piece by piece."""
        rows = max(1, piece_bytes // max(4 * math.prod(t.shape[1:]), 1))
        first, *others = box.slices()
        stored = self._stored[t.name]
        # the columns of a matrix are cut in the file, other dimensions after they were read
        narrow = len(box.whole) == len(t.shape) == 2 and not t.permute and stored.scale is None
        columns = tuple(others) if narrow else ()
        for a in range(0, len(part), rows):
            piece = part[a : a + rows]
            start = first.start + a
            theirs = self._rows(stored, start, start + len(piece), *columns)
            if not narrow:
                whole = torch.Size((len(piece), *box.whole[1:]))
                theirs = t.from_hf(theirs, whole)[(slice(None), *others)]
            piece.copy_(theirs)
            if not piece.isfinite().all():
                raise UserError(f"{located(stored.data.path)}: {t.name} holds inf or NaN")
            self._taken[t.name] += piece.numel()

    def _rows(self, stored: _Stored, start: int, stop: int, *columns: slice) -> Tensor:
        data = self._slice(stored.data, slice(start, stop), *columns)
        if stored.scale is None:
            return data
        if self._quantization.method == "mxfp4":
            return dequantize_mxfp4(data, self._slice(stored.scale, slice(start, stop)))
        block = self._quantization.block
        if data.dim() > 2:  # whole matrices
            return dequantize_fp8(data, self._slice(stored.scale, slice(start, stop)), block)
        scale = self._slice(stored.scale, slice(start // block[0], -(-stop // block[0])))
        return dequantize_fp8(data, scale, block, start)

    def _slice(self, raw: RawTensor, *index: slice) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self._files.slice(raw.path, raw.name, index)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{located(raw.path)}: {named(raw.name)}: unreadable: {one_line(error)}"
            ) from None

    def _language_model(self, found: dict[str, RawTensor]) -> dict[str, RawTensor]:
        prefix, inner = "language_model.", {}
        for name, tensor in found.items():
            if name.startswith(("vision_model.", "multi_modal_projector.")):
                self.left_out["vision model"] += 1
            elif name.removeprefix(prefix) in inner:
                self._refuse_twice(name, name.removeprefix(prefix), tensor)
            else:
                inner[name.removeprefix(prefix)] = tensor
        return inner

    def _refuse_twice(self, name: str, other: str, tensor: RawTensor) -> None:
        raise UserError(
            f"{located(tensor.path)}: {named(name)} and {named(other)} are both there: two forms "
            "of one tensor; remove one"
        )

    def _pair_with_scales(self, found: dict[str, RawTensor]) -> dict[str, _Stored]:
        """Quantized tensors under the name they have unquantized, with their factors."""
        method = self._quantization.method
        pairs = {"none": [], "fp8": [("", "_scale_inv")], "mxfp4": [("_blocks", "_scales")]}[method]
        stored: dict[str, _Stored] = {}
        used: set[str] = set()
        for data_end, scale_end in pairs:
            for scale_name in [name for name in found if name.endswith(scale_end)]:
                name = scale_name.removesuffix(scale_end)
                if name + data_end in found:
                    data, scale = found[name + data_end], found[scale_name]
                    stored[name] = _quantized(data, scale, self._quantization)
                    used |= {name + data_end, scale_name}
        for name, tensor in found.items():
            if name not in used:
                if name in stored:
                    self._refuse_twice(name, stored[name].data.name, tensor)
                stored[name] = _Stored(tensor, None, tensor.shape)
        return stored

    def _check_names(self, model: ModelConfig, raw: dict[str, Any]) -> None:
        expected = {t.name for t in self.tensors}
        missing = expected - self._stored.keys()
        if "lm_head.weight" in missing:
            raise UserError(
                f"{self.folder}: lm_head.weight is missing, though tie_word_embeddings in "
                "config.json is false or not given"
            )
        extra = [name for name in self._stored if name not in expected]
        extra = [name for name in extra if not self._may_leave_out(name, model, raw)]
        for kind, names in (("missing", missing), ("unexpected", extra)):
            if names:
                packed = (
                    names
                    and self._quantization.method == "none"
                    and any(
                        name.endswith(("_scale_inv", "_blocks", "_scales")) for name in self._stored
                    )
                )
                hint = "; config.json has no quantization_config for them" if packed else ""
                first = f"{named(min(names))}{hint}"
                raise UserError(f"{self.folder}: {len(names)} tensors {kind}, the first is {first}")

    def _may_leave_out(self, name: str, model: ModelConfig, raw: dict[str, Any]) -> bool:
        """Whether the model is the same without the tensor; recorded in `left_out`."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        given = (raw.get(key) for key in ("num_nextn_predict_layers", "num_mtp_layers"))
        modules = next((n for n in given if type(n) is int), 0)
        beyond = layer and model.n_layers <= int(layer[1]) < model.n_layers + modules
        if beyond and not model.mtp_depth:
            self.left_out["multi-token prediction"] += 1
        elif name.endswith(".rotary_emb.inv_freq"):
            self.left_out["RoPE frequencies, which config.json gives"] += 1
        elif name == "lm_head.weight" and model.tie_embeddings:
            self._twins[name] = "model.embed_tokens.weight"
            self.left_out["lm_head.weight, equal to the tied embedding"] += 1
        elif name in self._copies:
            self._twins[name] = self._copies[name]
            self.left_out["embedding and head, once more for a module that shares them"] += 1
        else:
            return False
        return True

    def _check_copy(self, name: str, of: str) -> None:
        """Check that a tensor that is left out equals the one that is read. Raises UserError."""
        copy, main = self._stored[name], self._stored[of]
        read = (partial(self._rows, copy), partial(self._rows, main))
        plain = copy.scale is not None or copy.data.dtype in _PLAIN
        if plain and same_rows((copy.shape, main.shape), read, PIECE_BYTES):
            return
        if name == "lm_head.weight":
            raise UserError(
                f"{self.folder / 'config.json'}: tie_word_embeddings = true, but lm_head.weight "
                f"is another matrix than {of}; set it to false"
            )
        raise UserError(
            f"{located(copy.data.path)}: {named(name)} is another matrix than {of}: modules for "
            "multi-token prediction with an embedding or head of their own are not supported"
        )

    def _check(self, t: HfTensor) -> None:
        stored = self._stored[t.name]
        data, place = stored.data, f"{located(stored.data.path)}: {named(stored.data.name)}"
        if stored.shape != t.shape:
            raise UserError(
                f"{place} has shape {shown(list(stored.shape))}, "
                f"config.json asks for {list(t.shape)}"
            )
        if stored.scale is not None:
            return
        if data.dtype not in _PLAIN:
            raise UserError(
                f"{place} has dtype {data.dtype} and no factors that quantization_config of "
                f"config.json announces: must be one of {', '.join(_PLAIN)}"
            )


def _within(t: HfTensor, box: Box) -> tuple[int, ...]:
    """Index of `ours[t.index]` in a tensor that contains just `box`."""
    return tuple(i - offset for i, offset in zip(t.index, box.offset, strict=False))


def _quantized(data: RawTensor, scale: RawTensor, how: Quantization) -> _Stored:
    """Combine data and factors. Raises UserError if they do not match."""
    if how.method == "fp8":
        dtypes, wanted = ["F8_E4M3"], _SCALE_DTYPES
        fits = len(data.shape) > 1 and scale.shape == scale_shape(data.shape, how.block)
        shape = data.shape
    else:
        dtypes, wanted = ["U8"], ["U8"]
        fits = len(data.shape) == 4 and data.shape == (*scale.shape, GROUP // 2)
        shape = (data.shape[0], data.shape[2] * GROUP, data.shape[1]) if fits else data.shape
    for tensor, allowed in ((data, dtypes), (scale, wanted)):
        if tensor.dtype not in allowed:
            raise UserError(
                f"{located(tensor.path)}: {named(tensor.name)} has dtype {named(tensor.dtype)}: "
                f"{how.method} has {' or '.join(allowed)} there"
            )
    if not fits:
        raise UserError(
            f"{located(scale.path)}: {named(scale.name)} has shape {shown(list(scale.shape))}, "
            f"which does not fit {named(data.name)} of {shown(list(data.shape))}"
        )
    return _Stored(data, scale, shape)
