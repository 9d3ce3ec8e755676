"""The parts of a model that a process reads from a folder: all of it, unless ranks divide it."""

from typing import Protocol

from torch import Tensor

from models.decoder import Decoder
from models.layers.box import Box


class Sharding(Protocol):
    """Divides a decoder among ranks."""

    def apply(self, decoder: Decoder) -> None:
        """Convert a decoder on the meta device to this rank's part of it, under the same names."""
        ...

    def part(self, tensor: Tensor) -> tuple[Tensor, Box]:
        """The memory of this rank's part of a parameter or buffer, and its box in the whole."""
        ...


class Unsharded:
    """Every tensor is read as a whole."""

    def apply(self, decoder: Decoder) -> None:
        """Change nothing."""

    def part(self, tensor: Tensor) -> tuple[Tensor, Box]:
        """The tensor itself."""
        return tensor, Box.all_of(tensor.shape)
