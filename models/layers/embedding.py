"""The embedding of tokens, whose weight may be shared with the head."""

from typing import Any

from torch import nn

from models.layers.local_view import LocalViews, local_view


class Embedding(nn.Embedding, LocalViews):
    """`nn.Embedding` whose weight may be sharded."""

    weight: Any = local_view("weight")
