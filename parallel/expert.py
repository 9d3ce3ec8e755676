"""Expert parallelism: each rank of `ep` holds `n_experts / ep` consecutive experts, and the ranks
of `etp` divide the width F of those.

| weight | over ep | over etp |
|---|---|---|
| w13 `[E, 2, F, D]`, b13 `[E, 2, F]` | E | F |
| w2 `[E, D, F]` | E | F |
| b2 `[E, D]` | E | D: each rank adds its slice, so that the sum over ranks counts it once |

The dispatcher of every MoE layer is replaced by one that exchanges rows over `ep`. With `etp` 1 the
ranks of `tp` send different tokens to the experts. With `etp` = `tp` they first gather them, each
computes its part of the width, and the partial sums are reduce-scattered: the router still
processes every token once.

Communication of one forward pass per rank and layer: over `ep` that of the dispatcher
(`parallel.dispatch`); over `etp`, for T tokens of the group, gather T * D in the compute dtype and
T * K ids (int64) and weights (fp32), reduce-scatter T * D. Backward: reduce-scatter T * D and
T * K weights, gather T * D.
"""

from configs.dispatch import DispatchConfig
from models.decoder import Decoder
from models.moe import LocalDispatcher, MoE
from models.parameters import spec_of
from parallel.dispatch.factory import dispatcher_maker
from parallel.dispatch.gathering import GatheringDispatcher
from parallel.dispatch.replicas import ReplicaDispatcher
from parallel.mesh import Mesh
from parallel.sharded_parameters import pad_local, shard_parameters
from parallel.tensor import RankOrderComm, TPGroupComm


def apply_expert_parallel(
    model: Decoder, mesh: Mesh, options: DispatchConfig, align: int = 1,
    power_of_two: bool = False, inference: bool = False,
) -> None:  # fmt: skip
    """Divide the experts of a model on the meta device by `ep` and `etp`.

    Args:
        model: The model.
        mesh: All ranks.
        options: How rows are exchanged.
        align: An expert's rows start at a multiple of this
            (`kernels.grouped_gemm.grouped_gemm_fp8`).
        power_of_two: Round the scales of rows sent in FP8 up to powers of two.
        inference: All ranks of `dp_shard` have the same tokens, and ranks are added in their order
            (`parallel.tensor.RankOrderComm`).
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in layers:
        moe.dispatcher = LocalDispatcher(model.config.moe.n_experts, align)
    axes = [axis for axis in ("ep", "etp") if mesh.expert[axis].size() > 1]
    if not axes:
        return
    group = mesh.expert["ep"].get_group()
    make_dispatcher = dispatcher_maker(
        model.config.moe.n_experts, group, options, align, power_of_two
    )
    for moe in layers:
        specs = {name: spec_of(f"experts.{name}") for name, _ in moe.experts.named_parameters()}
        dims = {name: tuple(getattr(spec, axis) for axis in axes) for name, spec in specs.items()}
        shard_parameters(moe.experts, mesh.expert[tuple(axes)], dims)
        if "ep" in axes:
            moe.dispatcher = make_dispatcher()
            if inference and mesh.parallel_dims.dp_shard > 1:
                replicas = mesh.dense["dp_shard"].get_group()
                moe.dispatcher = ReplicaDispatcher(moe.dispatcher, replicas)
        if "etp" in axes:
            for name, spec in specs.items():
                if spec.padded and spec.etp is not None:
                    pad_local(moe.experts, name, spec.etp, mesh.expert["etp"])
            comm = (RankOrderComm if inference else TPGroupComm)(mesh.expert["etp"].get_group())
            moe.dispatcher = GatheringDispatcher(moe.dispatcher, comm)
