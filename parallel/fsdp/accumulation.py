"""What FSDP2 keeps between the microbatches of a step: ZeRO's stages, of dense weights and experts.

Stage 3 frees gathered weights and reduces gradients in every microbatch. Stage 2 gathers each
weight once per step. Stage 1 also sums the gradients of whole weights in fp32, and reduces them
once per step, in the last microbatch. In all stages parameters, gradients and optimizer state of
the update are sharded.

For a group of N elements (its part after tp, ep, etp) and P microbatches a rank keeps and
exchanges:

| stage | kept between microbatches, bytes | all-gathers of N | reductions of N |
|---|---|---|---|
| 3 | | 2 P, or P without `reshard_after_forward` | P |
| 2 | 2 N (bf16; FP8: N) | 1 | P |
| 1 | 2 N + 4 N | 1 | 1 |

A group of one rank has the whole gradient in any case, so it copies it into FSDP2's buffer once per
step in every stage; and without `reshard_after_forward`, where all its weights are kept until
backward, it keeps them for the step. With `cpu_offload` the gradient belongs in host memory, and
neither is done.
"""

from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from configs.schema import ParallelConfig
from models.moe import Experts
from parallel.fsdp.fp8_weights import fsdp_groups


@dataclass(frozen=True)
class Group:
    """One group of collectives of FSDP2."""

    module: FSDPModule
    keeps_weights: bool
    """Between microbatches."""
    reduces_once: bool
    """Per step."""

    def begin(self, is_last: bool) -> None:
        """Prepare for a microbatch. is_last: of the step."""
        if self.keeps_weights:
            self.module.set_reshard_after_backward(is_last, recurse=False)
        if self.reduces_once:
            self.module.set_requires_gradient_sync(is_last, recurse=False)


class Accumulation:
    """Accumulation of gradients over the microbatches of a step."""

    def __init__(self, model: nn.Module, parallel: ParallelConfig) -> None:
        """model: after `parallel.apply.parallelize`."""
        self.model = model
        states: dict[int, FSDPModule] = {}
        for part in model.modules():
            if isinstance(part, FSDPModule):
                states.setdefault(id(part._get_fsdp_state()), part)
        self.groups = []
        for module in states.values():
            stage = parallel.stage(experts=isinstance(module, Experts))
            groups = fsdp_groups(cast(nn.Module, module))  # the first is its own
            one_rank = bool(groups) and groups[0].mesh_info.mesh.size() == 1
            local = one_rank and not parallel.cpu_offload
            keeps_weights = stage < 3 or (local and not parallel.reshard_after_forward)
            self.groups.append(Group(module, keeps_weights, stage < 2 or local))

    @property
    def keeps_anything(self) -> bool:
        """Between microbatches."""
        return any(group.keeps_weights or group.reduces_once for group in self.groups)

    def begin(self, is_last: bool) -> None:
        """Prepare for a microbatch; is_last: of the step."""
        for group in self.groups:
            group.begin(is_last)

    def discard(self) -> None:
        """Free gathered weights and unreduced gradients of a step that ends before its last
        microbatch."""
        for group in self.groups:
            group.module.reshard()
        for sharded in (
            record for group in fsdp_groups(self.model) for record in group.fsdp_params
        ):
            sharded.unsharded_accumulated_grad = None
            if hasattr(sharded, "_unsharded_param"):
                sharded.unsharded_param.grad = None
