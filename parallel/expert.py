"""Expert parallelism: each rank of the `ep` axis holds `n_experts / ep` neighbouring experts.

The expert weights become DTensors sharded over `ep` on dimension 0, so names and shapes stay
logical for checkpoints and clipping; the grouped GEMM sees the local experts. The dispatcher of
every MoE layer is replaced by one that exchanges rows.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from models.moe import Experts, MoE
from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.mesh import Mesh


def apply_expert_parallel(model: nn.Module, mesh: Mesh) -> None:
    """Shard the experts of a model on the meta device; nothing happens where `ep` is 1."""
    if mesh.degrees.ep == 1:
        return
    axis = mesh.expert["ep"]
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        for name, parameter in list(moe.experts.named_parameters()):
            assert parameter.is_meta, "experts are sharded before they are materialised"
            local = parameter.detach().chunk(mesh.degrees.ep)[0]
            shard = DTensor.from_local(local, axis, [Shard(0)], run_check=False)
            setattr(moe.experts, name, nn.Parameter(shard))
        moe.experts.__class__ = LocalExperts
        n_experts = moe.router.config.n_experts
        moe.dispatcher = AllToAllDispatcher(n_experts, axis.get_group())


class LocalExperts(Experts):
    """The experts of this rank: the same computation on the local shards of the weights."""

    def local(self, weight: Tensor) -> Tensor:
        assert isinstance(weight, DTensor)
        return weight.to_local()
