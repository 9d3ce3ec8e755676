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
"""

from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule

from configs.schema import ParallelConfig
from models.moe import Experts
from parallel.fsdp.fp8_weights import fsdp_groups


@dataclass(frozen=True)
class Group:
    """One group of collectives of FSDP2."""

    module: FSDPModule
    stage: int

    def begin(self, is_last: bool) -> None:
        """Prepare for a microbatch. is_last: of the step."""
        if self.stage < 3:
            self.module.set_reshard_after_backward(is_last, recurse=False)
        if self.stage < 2:
            self.module.set_requires_gradient_sync(is_last, recurse=False)


class Accumulation:
    """Accumulation of gradients over the microbatches of a step."""

    def __init__(self, model: nn.Module, parallel: ParallelConfig) -> None:
        """model: after `parallel.apply.parallelize`."""
        self.model = model
        states: dict[int, Group] = {}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                stage = parallel.stage(experts=isinstance(module, Experts))
                states.setdefault(id(module._get_fsdp_state()), Group(module, stage))
        self.groups = list(states.values())

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
