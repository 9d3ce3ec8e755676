"""The forward pass of a step by `kernels.fused_cpu`, if model and machine support it.

The layers' weights are packed once. A step is one call for all layers and one for the logits; a
router that the C++ does not support (groups, a bias, fewer than 16 softmax scores) is the training
module, between two calls. Before it is used, its results are compared with the torch form, bit by
bit, on a batch of random tokens: another CPU or another torch may sum in another order.
T tokens, K experts per token, D model width, V vocabulary.
"""

import ctypes
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.fused_cpu import layout
from kernels.fused_cpu.build import library
from models.attention import GroupedQueryAttention
from models.block import Block
from models.decoder import Decoder
from models.layers.linear import Fp8Module
from models.layers.rope import rope_tables
from models.moe import MoE
from models.router import Router
from models.step_context import MicrobatchContext, RoutingDecision
from serve.cache.kv_cache import KvCache
from serve.engine.batch import ForwardBatch

log = logging.getLogger("serve")
_ROWS = 8
"""The number of rows of a router's input is a multiple of this."""
_TOKENS, _POSITIONS = 512, 1024
"""Sizes of the first buffers and RoPE tables."""


def refusal(model: Decoder, cache: KvCache) -> str | None:
    """Why a model uses the torch form; None if it does not."""
    config, a, moe = model.config, model.config.attention, model.config.moe
    widths = [moe.d_expert, config.d_ff or 32]
    reasons = {
        "not bf16 on a CPU": cache.dtype != torch.bfloat16 or cache.device.type != "cpu",
        "multi-head latent attention": a.kind != "gqa",
        "biases, sinks or scaled queries": a.bias or a.sinks or bool(a.temperature_floor),
        "L2-normed queries": a.qk_norm == "l2",
        "the experts' form": moe.expert_bias or moe.activation != "swiglu"
        or moe.weight_on != "output" or moe.force_balance,
        "heads that are no multiple of 16 wide, or wider than 192": a.head_dim % 16 != 0
        or a.head_dim > 192,
        "a width that is no multiple of 16": config.d_model % 16 != 0,
        "hidden widths that are no multiples of 32": any(width % 32 for width in widths),
        "pages that are no multiple of 16 tokens": cache.page_size % 16 != 0,
        "modules of another precision": any(
            isinstance(module, Fp8Module) for module in model.modules()
        ),
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


def _routes_itself(router: Router) -> bool:
    rule = router.options
    return (
        router.bias is None
        and rule.top_groups == rule.n_groups
        and (not rule.softmax or router.config.n_experts >= 16)
    )


class FusedModel:
    """A decoder's weights in packed form, with a cache. Not thread-safe."""

    def __init__(self, model: Decoder, cache: KvCache, compiled: ctypes.CDLL) -> None:
        assert refusal(model, cache) is None
        self.model, self.cache, self.lib = model, cache, compiled
        self._weights = layout.Weights()
        config, a = model.config, model.config.attention
        sizes = layout.Model(
            config.d_model, a.n_heads, a.kv_heads, a.head_dim, cache.page_size,
            config.rope.interleaved, torch.get_num_threads(), config.norm_eps,
            model.embed.weight.data_ptr(),
        )  # fmt: skip
        compiled.make_engine.restype = ctypes.c_void_p
        self.engine = ctypes.c_void_p(compiled.make_engine(ctypes.byref(sizes)))
        blocks = model.blocks()[: config.n_layers]
        self.layers = (layout.Layer * len(blocks))(
            *(self._layer(i, block) for i, block in enumerate(blocks))
        )
        head = model.embed if model.head is None else model.head
        self.head = self._weights.add_matrix(head.weight.detach())
        self.routers = self._place_routers(blocks)
        self._step = layout.Step()
        self._make_room(_TOKENS)
        self._extend_rope(_POSITIONS)

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.lib.free_engine(self.engine)

    def bind(self, cache: KvCache) -> None:
        """Use another cache of the same page size."""
        assert cache.page_size == self.cache.page_size
        self.cache = cache
        for i, layer in enumerate(self.layers):
            layer.keys, layer.values = cache.keys(i).data_ptr(), cache.values(i).data_ptr()

    def count_into(self, counts_LE: Tensor) -> None:
        """Add the choices of all later steps to int64 `[MoE layers, experts]`."""
        assert counts_LE.dtype == torch.int64 and counts_LE.is_contiguous()
        self._counts, self._step.counts = counts_LE, counts_LE.data_ptr()

    def hidden(self, batch: ForwardBatch, context: MicrobatchContext | None = None) -> Tensor:
        """The residual stream `[T, D]` after the last layer, valid until the next call; keys and
        values are written to the cache. context: records the chosen experts; must not contain a
        choice yet."""
        step, T = self._prepare(batch), len(batch.tokens)
        K, D = self.model.config.moe.top_k, self.model.config.d_model
        L = len(self.routers)
        ids_LTK = self._ids[: L * T * K].view(L, T, K)
        stage = 0  # two per layer: attention, feed-forward
        for (layer, router), ids_TK in zip(self.routers, ids_LTK, strict=True):
            if self.layers[layer].routes_itself:
                continue
            self._forward(stage, 2 * layer + 1, step)
            ids, weights = router(self._normed[: (T + -T % _ROWS) * D].view(-1, D), None)
            ids_TK.copy_(ids[:T])
            self._routing_weights[: T * K].view(T, K).copy_(weights[:T])
            stage = 2 * layer + 1
        self._forward(stage, 2 * len(self.layers), step)
        if context is not None:
            for (layer, _), ids_TK in zip(self.routers, ids_LTK.clone(), strict=True):
                record = context.layers[layer]
                assert record is not None
                record.decision = RoutingDecision(ids_TK, None, None)
        return self._x[: T * D].view(T, D)

    def _prepare(self, batch: ForwardBatch) -> layout.Step:
        """The step of a batch, with buffers and RoPE tables that are large enough."""
        step, (n_requests, n_columns) = self._step, batch.page_tables.shape
        step.n_tokens, step.n_requests, step.n_columns = len(batch.tokens), n_requests, n_columns
        step.longest = n_columns * self.cache.page_size
        if step.n_tokens > self._room:
            self._make_room(2 * step.n_tokens)
        if step.longest > self._n_positions:
            self._extend_rope(2 * step.longest)
        step.tokens, step.positions = batch.tokens.data_ptr(), batch.positions.data_ptr()
        step.starts, step.lengths = batch.query_starts.data_ptr(), batch.key_lengths.data_ptr()
        step.tables = batch.page_tables.data_ptr()
        return step

    def _make_room(self, n_tokens: int) -> None:
        """Allocate the buffers of steps of up to this many tokens."""
        self._room = n_tokens + -n_tokens % _ROWS
        top_k, like = self.model.config.moe.top_k, self.model.embed.weight
        self._x, self._normed = like.new_empty(2, self._room * self.model.config.d_model)
        self._ids = torch.empty(len(self.routers) * self._room * top_k, dtype=torch.int64)
        self._routing_weights = torch.empty(self._room * top_k)
        self._step.x, self._step.normed = self._x.data_ptr(), self._normed.data_ptr()
        self._step.ids, self._step.weights = self._ids.data_ptr(), self._routing_weights.data_ptr()

    def _extend_rope(self, n_positions: int) -> None:
        """Compute the RoPE tables of the first positions."""
        self._n_positions, config = n_positions, self.model.config
        tables = rope_tables(torch.arange(n_positions), config.rope, config.attention.rope_dim)
        self._cos, self._sin = (table.contiguous() for table in tables)
        self._step.cos, self._step.sin = self._cos.data_ptr(), self._sin.data_ptr()

    def _forward(self, begin: int, end: int, step: layout.Step) -> None:
        self.lib.forward(self.engine, self.layers, begin, end, ctypes.byref(step))

    def logits(self, x_TD: Tensor, rows: Tensor) -> Tensor:
        """fp32 `[n, V]` of rows of the residual stream."""
        out = torch.empty(len(rows), self.head.n)
        self.lib.logits(
            self.engine, ctypes.c_void_p(self.model.norm.weight.data_ptr()),
            ctypes.byref(self.head), ctypes.c_void_p(x_TD.data_ptr()),
            ctypes.c_void_p(rows.data_ptr()), len(rows), ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out[:, : self.model.config.vocab_size]

    def _place_routers(self, blocks: Sequence[Block]) -> list[tuple[int, Router]]:
        """Layers with experts, and their routers."""
        routers = [
            (i, block.ffn.router) for i, block in enumerate(blocks) if isinstance(block.ffn, MoE)
        ]
        for index, (layer, _) in enumerate(routers):
            self.layers[layer].moe_index = index
        return routers

    def _layer(self, index: int, block: Block) -> layout.Layer:
        attention, ffn, cache = block.attention, block.ffn, self.cache
        assert isinstance(attention, GroupedQueryAttention)
        projections = (attention.wq, attention.wk, attention.wv)
        layer = layout.Layer(
            attention_norm=block.attention_norm.weight.data_ptr(),
            ffn_norm=block.ffn_norm.weight.data_ptr(),
            q_norm=None if attention.q_norm is None else attention.q_norm.weight.data_ptr(),
            k_norm=None if attention.k_norm is None else attention.k_norm.weight.data_ptr(),
            qkv=self._weights.add_matrix(torch.cat([p.weight.detach() for p in projections])),
            wo=self._weights.add_matrix(attention.wo.weight.detach()),
            keys=cache.keys(index).data_ptr(), values=cache.values(index).data_ptr(),
            scale=attention.layer.scale, window=attention.layer.window,
            chunk=attention.layer.chunk, has_rope=attention.has_rope,
        )  # fmt: skip
        if isinstance(ffn, MoE):
            self._add_experts(layer, ffn)
        dense = ffn.shared_experts if isinstance(ffn, MoE) else ffn
        if dense is not None:
            w13 = layout.interleaved_halves(dense.w13.detach()[None])[0]
            layer.d_shared = dense.w13.shape[1]
            layer.shared13 = self._weights.add_matrix(w13)
            layer.shared2 = self._weights.add_matrix(dense.w2.detach())
        return layer

    def _add_experts(self, layer: layout.Layer, ffn: MoE) -> None:
        experts, router = ffn.experts, ffn.router
        layer.experts13, layer.experts2, layer.router, layer.bias = map(
            self._weights.add,
            (
                layout.packed(layout.interleaved_halves(experts.w13.detach())),
                layout.packed(experts.w2.detach()),
                router.weight.detach().float(),
                router.bias_E,
            ),
        )
        layer.n_experts, layer.top_k = router.config.n_experts, router.config.top_k
        layer.d_expert = router.config.d_expert
        layer.softmax, layer.normalize = router.options.softmax, router.options.normalize
        layer.routes_itself = _routes_itself(router)
        layer.route_scale = router.options.scale


def build_fused(model: Decoder, cache: KvCache) -> FusedModel | None:
    """The fused form of a model, or None, with the reason in the log."""
    reason = refusal(model, cache)
    if reason is not None:
        log.info("computed by torch's operations: %s", reason)
        return None
    compiled = library()
    return None if compiled is None else FusedModel(model, cache, compiled)
