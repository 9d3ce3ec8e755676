"""Events of the prefix cache: which blocks (pages) of tokens can be reused from now on.

A router outside builds an index from them that equals our radix tree. Names and format are those of
vLLM's KV events (msgpack): a batch is the array `[time, events]`, an event a map with its `type`.
The hash of a block includes all tokens before it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

MAX_TOKENS = 4096
"""Tokens, or hashes of removed blocks, of one event."""


class BlockStored(msgspec.Struct, tag=True):
    """Consecutive blocks were added after the block `parent_block_hash`, or as first ones."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    """Tokens per block."""
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks were evicted."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The cache is empty: it was flushed, the weights were changed, or the engine has started."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True):
    """What one message has."""

    ts: float
    """Seconds since 1970."""
    events: list[Event]


class BlockEvents(Protocol):
    """Is notified by the cache, in the engine's thread."""

    def stored(self, parent: int | None, hashes: Sequence[int], key: bytes) -> None:
        """Blocks were added. key: their tokens (`token_key`)."""
        ...

    def removed(self, hashes: Sequence[int]) -> None: ...

    def cleared(self) -> None: ...


def block_hashes(parent: int | None, key: bytes, block_bytes: int) -> list[int]:
    """64-bit hashes of the blocks of `key`, each of the hash before it and its own tokens."""
    found = []
    last = b"" if parent is None else parent.to_bytes(8, "big")
    for at in range(0, len(key), block_bytes):
        last = hashlib.blake2b(last + key[at : at + block_bytes], digest_size=8).digest()
        found.append(int.from_bytes(last, "big"))
    return found


def stored_events(
    parent: int | None, hashes: Sequence[int], key: bytes, block_size: int
) -> Iterator[BlockStored]:
    """Events of limited size for consecutive blocks."""
    most = max(1, MAX_TOKENS // block_size)
    tokens = memoryview(key).cast("i").tolist()
    for at in range(0, len(hashes), most):
        some = list(hashes[at : at + most])
        own = tokens[at * block_size : (at + len(some)) * block_size]
        yield BlockStored(some, parent, own, block_size)
        parent = some[-1]


class BlockIndex:
    """The blocks that a sequence of events leaves: what a router knows, and what one that begins
    late is sent."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        """Hash to the hash of the block before it and the tokens."""

    def apply(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                parent, size = event.parent_block_hash, event.block_size
                for n, block in enumerate(event.block_hashes):
                    tokens = tuple(event.token_ids[n * size : (n + 1) * size])
                    self.blocks[block] = parent, tokens
                    parent = block
            elif isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    self.blocks.pop(block, None)
            else:
                self.blocks.clear()

    def events(self) -> list[Event]:
        """Events that lead from any index to this one."""
        return [
            AllBlocksCleared(),
            *(
                BlockStored([block], parent, list(tokens), len(tokens))
                for block, (parent, tokens) in self.blocks.items()
            ),
        ]
