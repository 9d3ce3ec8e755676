"""The KV cache of all running requests, in pages.

A request owns whole pages, in any order, so memory is lost only in its last page (PagedAttention,
arXiv:2309.06180). Page 0 is never allocated and stays zero: padding refers to it.

The values stored per token depend on the attention:

| attention | tensors, per layer | values per token and layer |
|---|---|---|
| grouped heads | keys `[pages, G, C, size]`, values `[pages, G, size, C]` | 2 G C |
| latent (MLA) | latents `[pages, size, N]`: compressed keys and values, rotated key | kv_lora_rank + qk_rope_head_dim |

Keys of consecutive tokens are adjacent in memory, as the product with a query requires: it sums
over C for 16 tokens at a time. A slot is a token's position: page * size + offset.

G key/value heads, C head width, N = kv_lora_rank + qk_rope_head_dim.
"""  # noqa: E501

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from kernels import huge_pages

_SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.8}
"""Share of the memory that is free after the weights are loaded; a CPU also runs other programs."""


class KvCache:
    """The pages on their device, which `serve.cache.allocator` allocates."""

    def __init__(
        self,
        model: ModelConfig,
        n_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size, self.n_pages = page_size, n_pages
        self.dtype, self.device = dtype, device
        a = model.attention
        self.is_latent = a.kind == "mla"
        shapes: list[tuple[int, ...]]
        if self.is_latent:
            shapes = [(n_pages, page_size, a.kv_lora_rank + a.qk_rope_head_dim)]
        else:
            heads, width = a.kv_heads, a.head_dim
            shapes = [(n_pages, heads, width, page_size), (n_pages, heads, page_size, width)]
        self.tensors = [_zeros((model.n_layers, *shape), dtype, device) for shape in shapes]
        """Keys and values, or latents, of all layers."""
        self.values_per_token = values_per_token(model)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return (self.n_pages - 1) * self.page_size

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def describe(self) -> str:
        """A description for the user: capacity and memory."""
        per_token = self.values_per_token * self.dtype.itemsize
        kind = "latents" if self.is_latent else "keys and values"
        return (
            f"{self.capacity} tokens in {self.n_pages - 1} pages of {self.page_size}, "
            f"{self.n_bytes / 2**20:.1f} MiB, {per_token} bytes of {kind} per token and layer"
        )

    def keys(self, layer: int) -> Tensor:
        """`[pages, G, C, size]`, a view."""
        return self.tensors[0][layer]

    def values(self, layer: int) -> Tensor:
        """`[pages, G, size, C]`, a view."""
        return self.tensors[1][layer]

    def latents(self, layer: int) -> Tensor:
        """`[pages, size, N]`, a view."""
        return self.tensors[0][layer]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return huge_pages.zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def values_per_token(model: ModelConfig) -> int:
    """Numbers stored per token and layer."""
    a = model.attention
    if a.kind == "mla":
        return a.kv_lora_rank + a.qk_rope_head_dim
    return 2 * a.kv_heads * a.head_dim


def bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes stored per token in all layers."""
    return model.n_layers * values_per_token(model) * dtype.itemsize


def build_cache(
    model: ModelConfig,
    *,
    kv_tokens: int,
    page_size: int,
    wanted: int,
    dtype: torch.dtype,
    device: torch.device,
    free: int | None = None,
) -> KvCache:
    """The cache of a server. Raises UserError if it does not fit.

    Args:
        model: The model.
        kv_tokens: Capacity in tokens, rounded up to pages; 0 means `wanted` tokens, or as many as
            fit into a share of the free memory if that is less.
        page_size: Tokens per page.
        wanted: Default capacity.
        dtype, device: Of the cache.
        free: Free bytes; by default those of the device.
    """
    free = free_memory(device) if free is None else free
    each = bytes_per_token(model, dtype)
    if not kv_tokens:
        share = _SHARE_OF_FREE_MEMORY.get(device.type, 0.25)
        kv_tokens = min(wanted, int(free * share) // each)
        if kv_tokens < page_size:
            raise UserError(f"no memory for a KV cache: {free / 2**20:.0f} MiB are free")
    n_pages = -(-kv_tokens // page_size) + 1
    size = n_pages * page_size * each
    if size > free:
        raise UserError(
            f"--kv-tokens {kv_tokens}: needs {size / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free; at most {free // each} tokens fit"
        )
    return KvCache(model, n_pages, page_size, dtype, device)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 2**30  # not Linux: a guess that only limits the default
