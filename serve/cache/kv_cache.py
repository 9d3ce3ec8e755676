"""Keys and values of all running requests, in pages.

The pool is one tensor `[layers, 2, pages, page_size, G, C]`; a request owns whole pages, in any
order, so memory is lost only in its last page (PagedAttention, arXiv:2309.06180). Page 0 belongs
to nobody and stays zero: padding points at it, so a batch of unequal lengths never reads what
another request left behind.

Layer first, because the attention of a layer then indexes one contiguous block. A slot is a
token's place: page * page_size + offset. G key/value heads, C head width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig

_SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.8}
"""Of what is free after the weights are loaded; on a CPU other programs live in it too."""


class PageAllocator:
    """A free list. Pages 1 to `n_pages - 1` are given out, page 0 never is."""

    def __init__(self, n_pages: int) -> None:
        assert n_pages >= 2
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, 0, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """`n` pages, or None (and nothing changes) where there are not as many."""
        if n > len(self._free):
            return None
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return taken

    def release(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that every page is either free or owned exactly once."""
        pages = self._free + [page for some in owned for page in some]
        assert sorted(pages) == list(range(1, self.n_pages)), "a page leaked or has two owners"


class KvCache:
    """The pool on its device, and the allocator of its pages."""

    def __init__(
        self,
        model: ModelConfig,
        n_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(n_pages)
        self.pool = torch.zeros(
            model.n_layers,
            2,
            n_pages,
            page_size,
            model.attention.kv_heads,
            model.attention.head_dim,
            dtype=dtype,
            device=device,
        )
        self.slots_LS = self.pool.flatten(2, 3)
        """The pool as `[layers, 2, slots, G, C]`; the same memory."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return (self.allocator.n_pages - 1) * self.page_size

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def describe(self) -> str:
        """One phrase for the user: capacity and memory."""
        return (
            f"{self.capacity} tokens in {self.allocator.n_pages - 1} pages of {self.page_size}, "
            f"{self.pool.nbytes / 2**20:.1f} MiB"
        )

    def keys(self, layer: int) -> Tensor:
        """`[slots, G, C]`, a view."""
        return self.slots_LS[layer, 0]

    def values(self, layer: int) -> Tensor:
        """`[slots, G, C]`, a view."""
        return self.slots_LS[layer, 1]


def bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return model.n_layers * 2 * model.attention.kv_heads * model.attention.head_dim * dtype.itemsize


def build_cache(
    model: ModelConfig,
    *,
    kv_tokens: int,
    page_size: int,
    wanted: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KvCache:
    """The cache of a server.

    kv_tokens: capacity in tokens, rounded up to pages; 0 means `wanted` tokens, or what a share of
    the free memory holds where that is less. UserError where it does not fit.
    """
    free = free_memory(device)
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
        return 4 * 2**30  # no Linux: a guess that only bounds the default
