"""AdamW whose two moments are stored in bf16 (DeepSeek-V3, arXiv:2412.19437, section 3.3.3).

The moments are half of a rank's memory of a model between steps: 8 of 16 bytes per parameter, here
4 of 12. They need range, which bf16 has, more than digits: an update is a quotient of the two, and
a relative error of 2^-9 in it is small compared to the noise of a gradient. Weights, in contrast,
sum up small updates, which bf16 would round away; masters and gradients stay fp32.

Only the stored moments are rounded (to nearest). Each parameter's moments are converted to fp32,
torch's own update is applied to these, and they are rounded again: one rounding per step, and 8
bytes per element of one parameter at a time. Torch's fused update supports bf16 moments with fp32
weights on CUDA only.

Not implemented: stochastic rounding. A change of less than half of bf16's spacing is rounded away,
so a mean does not change if a new value differs from it by less than 2^-8 / (1 - decay): 8 percent
of a squared gradient at 0.95, that is 4 percent of an update. `configs.schema` rejects decays above
0.98, where it would be 20.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.shards import local_of
from train.optim.fused_update import MOMENTS, fused_update, initial_state


class Bf16MomentsAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused, with `exp_avg` and `exp_avg_sq` in bf16."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(initial_state(parameter, torch.bfloat16))
        stored = [local_of(state[name]) for name in MOMENTS]
        fp32 = [moment.float() for moment in stored]
        fused_update([parameter], [fp32], [state["step"]], group)
        for moment, exact in zip(stored, fp32, strict=True):
            moment.copy_(exact)
