"""Input of `block.cpp`: structures, and weights packed in its layout.

Packed weights: consecutive blocks of 64 outputs, the last one shorter (a multiple of 16). A block
stores, for every pair of input columns, the two values of each output. So a product reads a weight
sequentially, for any number of rows.

N outputs, K inputs, E experts, F hidden width.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import huge_pages

_BLOCK = 64
_CACHE_LINE = 64
_CHUNK = 64 << 20
"""Bytes of memory that are allocated together; untouched pages take no memory."""


class Matrix(ctypes.Structure):
    _fields_ = [("packed", c_void_p), ("n", c_int64), ("k", c_int64)]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "d_model", "n_heads", "n_groups", "width", "page_size", "interleaved", "threads",
        )),
        ("eps", c_float), ("embed", c_void_p),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        ("qkv", Matrix), ("wo", Matrix), ("keys", c_void_p), ("values", c_void_p),
        ("scale", c_float),
        *((name, c_int32) for name in (
            "window", "chunk", "has_rope", "n_experts", "top_k", "d_expert", "d_shared",
        )),
        ("experts13", c_void_p), ("experts2", c_void_p), ("shared13", Matrix), ("shared2", Matrix),
        ("router", c_void_p), ("bias", c_void_p),
        *((name, c_int32) for name in ("softmax", "normalize", "routes_itself")),
        ("route_scale", c_float), ("moe_index", c_int32),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n_tokens", "n_requests", "n_columns", "longest")),
        *((name, c_void_p) for name in (
            "tokens", "positions", "starts", "lengths", "tables", "cos", "sin", "x", "normed",
            "ids", "weights", "counts",
        )),
    ]  # fmt: skip


def packed(weight_ENK: Tensor) -> Tensor:
    """bf16 `[E, n * K]` of `[E, N, K]`, n the next multiple of 16."""
    E, N, K = weight_ENK.shape
    weight_ENK = F.pad(weight_ENK, (0, 0, 0, -N % 16))
    whole = weight_ENK.shape[1] // _BLOCK * _BLOCK
    parts = []
    for part, size in ((weight_ENK[:, :whole], _BLOCK), (weight_ENK[:, whole:], 16)):
        if not part.shape[1]:
            continue
        size = _BLOCK if size == _BLOCK else part.shape[1]
        blocks = part.reshape(E, -1, size, K // 2, 2).transpose(2, 3)
        parts.append(blocks.reshape(E, -1))
    return torch.cat(parts, 1)


def interleaved_halves(w13_E2FD: Tensor) -> Tensor:
    """`[E, 2F, D]` with alternating 32 rows of gate and 32 of up, so that every block has both."""
    blocks = w13_E2FD.unflatten(2, (-1, _BLOCK // 2))
    return blocks.transpose(1, 2).flatten(1, 3)


class Weights:
    """Copies of weights in huge pages."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used = 0

    def add(self, tensor: Tensor) -> int:
        """The address of a copy, which exists as long as this object."""
        if not self._chunks or self._used + tensor.nbytes > len(self._chunks[-1]):
            self._chunks.append(huge_pages.zeros((max(tensor.nbytes, _CHUNK),), torch.uint8))
            self._used = 0
        copy = self._chunks[-1][self._used : self._used + tensor.nbytes].view(tensor.dtype)
        copy.copy_(tensor.flatten())
        self._used += -(-tensor.nbytes // _CACHE_LINE) * _CACHE_LINE
        return copy.data_ptr()

    def add_matrix(self, weight_NK: Tensor) -> Matrix:
        """A packed weight."""
        N, K = weight_NK.shape
        return Matrix(self.add(packed(weight_NK[None])), N + -N % 16, K)
