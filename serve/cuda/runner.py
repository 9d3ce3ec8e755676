"""The model runner on CUDA: attention by kernels on the pages, decode steps as graphs.

On a CPU, where its tests run it, the kernels' references compute the attention, and the graphs'
buffers are used without graphs.

T tokens, D model width.
"""

import torch
from torch import Tensor

from models.decoder import Decoder
from models.step_context import MicrobatchContext
from serve.cache.kv_cache import KvCache
from serve.cuda.attention import DeviceBatch, KernelAttention, to_device
from serve.cuda.decode_graphs import DecodeGraphs, Hidden
from serve.engine.batch import ForwardBatch
from serve.engine.runner import ModelRunner


class CudaRunner(ModelRunner):
    """The model and its cache on a device."""

    def __init__(
        self, model: Decoder, cache: KvCache, max_running: int = 0, max_pages: int = 0
    ) -> None:
        """max_running: largest number of requests of a decode step that is a graph; 0: none.
        max_pages: largest number of pages of a request."""
        super().__init__(model, cache, absorbed=cache.is_latent, fuses=False)
        self.graphs: DecodeGraphs | None = None
        if max_running:
            with torch.inference_mode():
                self.graphs = DecodeGraphs.create(
                    self._forward, max_running, cache.page_size, max_pages, cache.device
                )

    def _hidden(self, batch: ForwardBatch, context: MicrobatchContext | None) -> Hidden:
        if context is None and self.graphs is not None and self.graphs.fits(batch):
            return self.graphs.run(batch)
        cache = self.cache
        return self._forward(to_device(batch, cache.page_size, cache.device), context)

    def _forward(self, batch: DeviceBatch, context: MicrobatchContext | None = None) -> Hidden:
        def output(x_TD: Tensor, head_VD: Tensor) -> Hidden:
            return x_TD, head_VD

        context = context or self._recording()
        hidden: Hidden = self.model(
            batch.tokens, batch.positions, KernelAttention(self.cache, batch), output=output,
            context=context,
        )  # fmt: skip
        if context is not None:
            self.counts.add(context.routed_experts(), batch.slots >= 0)  # others are padding
        return hidden
