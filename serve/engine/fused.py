"""The forward pass of a step by `kernels.fused_cpu`, if model and machine support it.

The layers' weights are packed once. Per step and layer there are two calls, and one for the logits;
a router that the C++ does not support (groups, a bias, fewer than 16 softmax scores) is the
training module. Before it is used, its results are compared with the torch form, bit by bit, on a
batch of random tokens: another CPU or another torch may sum in another order.
T tokens, K experts per token, D model width, V vocabulary.
"""

import ctypes
import logging

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
from models.step_context import LayerContext, MicrobatchContext, RoutingDecision
from serve.cache.kv_cache import KvCache
from serve.engine.batch import ForwardBatch

log = logging.getLogger("serve")
_ROWS = 8
"""The number of rows of a router's input is a multiple of this."""


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
        self._keep: list[Tensor] = []
        config, a = model.config, model.config.attention
        sizes = layout.Model(
            config.d_model, a.n_heads, a.kv_heads, a.head_dim, cache.page_size,
            config.rope.interleaved, torch.get_num_threads(), config.norm_eps,
        )  # fmt: skip
        compiled.make_engine.restype = ctypes.c_void_p
        self.engine = ctypes.c_void_p(compiled.make_engine(ctypes.byref(sizes)))
        blocks = model.blocks()[: config.n_layers]
        self.layers = [self._layer(i, block) for i, block in enumerate(blocks)]
        head = model.embed if model.head is None else model.head
        self.head = layout.matrix(head.weight.detach(), self._keep)
        self.routers: list[Router | None] = [
            block.ffn.router if isinstance(block.ffn, MoE) else None for block in blocks
        ]

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.lib.free_engine(self.engine)

    def bind(self, cache: KvCache) -> None:
        """Use another cache of the same page size."""
        assert cache.page_size == self.cache.page_size
        self.cache = cache
        for i, layer in enumerate(self.layers):
            layer.keys, layer.values = cache.keys(i).data_ptr(), cache.values(i).data_ptr()

    def hidden(self, batch: ForwardBatch, context: MicrobatchContext | None = None) -> Tensor:
        """The residual stream `[T, D]` after the last layer; keys and values are written to the
        cache. context: records the chosen experts; must not contain a choice yet."""
        T, moe = len(batch.tokens), self.model.config.moe
        a = self.model.config.attention
        x_TD = self.model.embed.weight.index_select(0, batch.tokens)
        normed_TD = x_TD.new_zeros(T + -T % _ROWS, x_TD.shape[1])
        ids_TK = torch.empty(T, moe.top_k, dtype=torch.int64)
        weights_TK = torch.empty(T, moe.top_k)
        cos, sin = rope_tables(batch.positions, self.model.config.rope, a.rope_dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        step = layout.Step(
            T, len(batch.key_lengths), batch.page_tables.shape[1], int(batch.key_lengths.max()),
            *(t.data_ptr() for t in (
                batch.positions, batch.query_starts, batch.key_lengths, batch.page_tables, cos, sin,
                x_TD, normed_TD, ids_TK, weights_TK,
            )),
        )  # fmt: skip
        to_step = ctypes.byref(step)
        records = [None] * len(self.layers) if context is None else context.layers
        for layer, router, record in zip(self.layers, self.routers, records, strict=False):
            to_layer = ctypes.byref(layer)
            self.lib.attention_block(self.engine, to_layer, to_step)
            if router is not None:
                self._route(router, record, to_layer, to_step, normed_TD, ids_TK, weights_TK)
            self.lib.feed_forward(self.engine, to_layer, to_step)
        return x_TD

    def _route(
        self, router: Router, record: LayerContext | None, to_layer: object, to_step: object,
        normed_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor,
    ) -> None:  # fmt: skip
        n = len(ids_TK)
        if not _routes_itself(router):
            ids, weights = router(normed_TD, record)
            ids_TK.copy_(ids[:n])
            weights_TK.copy_(weights[:n])
            return
        self.lib.route(self.engine, to_layer, to_step)
        if record is not None:
            record.decision = RoutingDecision(ids_TK.clone(), None, None)

    def logits(self, x_TD: Tensor, rows: Tensor) -> Tensor:
        """fp32 `[n, V]` of rows of the residual stream."""
        out = torch.empty(len(rows), self.head.n)
        self.lib.logits(
            self.engine, ctypes.c_void_p(self.model.norm.weight.data_ptr()),
            ctypes.byref(self.head), ctypes.c_void_p(x_TD.data_ptr()),
            ctypes.c_void_p(rows.data_ptr()), len(rows), ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out[:, : self.model.config.vocab_size]

    def _layer(self, index: int, block: Block) -> layout.Layer:
        attention, ffn, cache = block.attention, block.ffn, self.cache
        assert isinstance(attention, GroupedQueryAttention)
        projections = (attention.wq, attention.wk, attention.wv)
        layer = layout.Layer(
            attention_norm=block.attention_norm.weight.data_ptr(),
            ffn_norm=block.ffn_norm.weight.data_ptr(),
            q_norm=None if attention.q_norm is None else attention.q_norm.weight.data_ptr(),
            k_norm=None if attention.k_norm is None else attention.k_norm.weight.data_ptr(),
            qkv=layout.matrix(torch.cat([p.weight.detach() for p in projections]), self._keep),
            wo=layout.matrix(attention.wo.weight.detach(), self._keep),
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
            layer.shared13 = layout.matrix(w13, self._keep)
            layer.shared2 = layout.matrix(dense.w2.detach(), self._keep)
        return layer

    def _add_experts(self, layer: layout.Layer, ffn: MoE) -> None:
        experts, router = ffn.experts, ffn.router
        kept = [
            layout.packed(layout.interleaved_halves(experts.w13.detach())),
            layout.packed(experts.w2.detach()),
            router.weight.detach().float().contiguous(),
            router.bias_E,
        ]
        self._keep += kept
        layer.experts13, layer.experts2, layer.router, layer.bias = (t.data_ptr() for t in kept)
        layer.n_experts, layer.top_k = router.config.n_experts, router.config.top_k
        layer.d_expert = router.config.d_expert
        layer.softmax, layer.normalize = router.options.softmax, router.options.normalize
        layer.route_scale = router.options.scale


def build_fused(model: Decoder, cache: KvCache) -> FusedModel | None:
    """The fused form of a model, or None, with the reason in the log."""
    reason = refusal(model, cache)
    if reason is not None:
        log.info("computed by torch's operations: %s", reason)
        return None
    compiled = library()
    return None if compiled is None else FusedModel(model, cache, compiled)
