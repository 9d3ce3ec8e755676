"""Divides a model for inference: tensor and expert parallelism as in training, without FSDP2.

Weights are neither gathered nor updated, so every rank keeps exactly its part of them in the
compute dtype. Weights that no axis divides (norms, router, MLA's compressions) are on every rank,
and with more ranks of `ep` than of `tp` so are the divided weights of each `tp` rank.

All ranks compute the same tokens, whose number must be a multiple of the number of ranks.
"""

from torch import Tensor

from configs.dispatch import DispatchConfig
from configs.errors import UserError
from kernels.grouped_gemm.grouped_gemm_fp8 import row_alignment
from models.box import Box
from models.decoder import Decoder
from models.fp8 import fp8_modules
from parallel.expert import apply_expert_parallel
from parallel.fp8_weights import cut_within_block
from parallel.mesh import Mesh
from parallel.shards import box_of, local_of
from parallel.tensor import RankOrderComm, apply_tensor_parallel


class InferenceSharding:
    """`models.hf.sharding.Sharding` over a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def apply(self, decoder: Decoder) -> None:
        """Divide a decoder on the meta device. Raises UserError, one line, if `tp` would cut the
        blocks of an FP8 weight."""
        shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        align = row_alignment(self.mesh.device_type) if fp8_modules(decoder) else 1
        apply_expert_parallel(decoder, self.mesh, DispatchConfig(), align, inference=True)
        apply_tensor_parallel(decoder, self.mesh.dense["tp"], RankOrderComm)
        cut = cut_within_block(decoder, shapes)
        if cut is not None:
            raise UserError(
                f"--tp {self.mesh.parallel_dims.tp}: {cut}; use a smaller --tp, a larger --ep if "
                "it is an expert's weight, or --dtype bf16"
            )

    def part(self, tensor: Tensor) -> tuple[Tensor, Box]:
        """The memory of this rank's part, and its box in the whole."""
        return local_of(tensor), box_of(tensor)
