"""Every setting of a run, with type and documentation: the only definition of the keys.

The schema imports only the standard library, so that a login node can check an experiment. The
string under a field is its documentation (`python -m configs --reference` prints them all).
`__post_init__` rejects wrong values; `configs.parallel_dims` checks what depends on the number of
ranks.
"""

from dataclasses import dataclass, field
from typing import Literal

from configs.data import DataConfig
from configs.dispatch import DispatchConfig
from configs.errors import ConfigError
from configs.health.settings import HealthConfig
from configs.model import ModelConfig
from configs.precision import PrecisionConfig
from configs.rules import at_most, between, not_empty, shown


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str
    """Folder of the run: checkpoints, metrics, plots, export. A run in an existing folder
    resumes."""
    seed: int = 0
    """Seed of initialization and data order. The same seed gives the same model on every mesh."""

    def __post_init__(self) -> None:
        between(self, 0, 2**63 - 1, "seed")
        not_empty(self, "name a folder, for example runs/demo", "dir")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """Optimizer steps of the whole run."""
    global_batch: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int
    """Sequences per rank and forward pass; the rest is gradient accumulation."""
    mtp_weight: float = 0.3
    """Factor of the mean loss of the MTP modules (with `model.mtp_depth`). DeepSeek-V3: 0.3 for the
    first 10T tokens, 0.1 for the other 4.8T."""
    z_loss_coef: float = 0.0
    """Factor of the mean over target tokens of logsumexp(logits)^2 (z-loss, PaLM: 1e-4), in the
    loss of the model and of each MTP module. It contributes its gradient only; the reported loss is
    still the cross-entropy. 0: off."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    log_every: int = 1
    """Steps between lines of the log."""
    profile_steps: tuple[int, ...] = ()
    """Steps whose profiler trace is written to `<run>/profile` (Chrome trace format)."""
    gc_every: int = 200
    """Steps between Python garbage collections, which all ranks run at the same step."""
    threads: int = 0
    """CPU threads per rank. 0: OMP_NUM_THREADS, or all cores divided by the ranks of this host."""
    deterministic: bool = False
    """Use algorithms whose results have the same bits in every run, also on CUDA, where they are
    slower and some operations of torch have none: the run then ends with an error that names it.
    On a CPU results have the same bits anyway."""

    def __post_init__(self) -> None:
        between(self, 1, 2**31, "steps", "log_every", "gc_every")
        between(self, 1, 2**20, "global_batch", "micro_batch")
        between(self, 0, 1e9, "clip_norm")
        between(self, 0, 100, "mtp_weight", "z_loss_coef")
        between(self, 0, 1024, "threads")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float
    """Peak learning rate of AdamW, which changes a weight by about this much per step: usually 1e-5
    to 1e-2. At most 1e38, about the largest that fp32 holds."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square, so that nothing is divided by zero: 1e-30 to 1."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices, at most 100; norms, biases and routers have none."""

    def __post_init__(self) -> None:
        between(self, 0, 1e38, "lr")
        between(self, 0, 100, "weight_decay")
        between(self, 1e-30, 1, "eps")
        between(self, 0.0, 0.999999, "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["wsd", "cosine", "linear"] = "wsd"
    """`wsd`: warmup, stable, then linear decay over the last `decay_fraction` of the steps
    (arXiv:2404.06395). `cosine`, `linear`: decay from the end of the warmup to the last step."""
    steps: int = 0
    """Steps of the whole schedule. It may be longer than this run, or shorter: then the rate
    stays at its last value. The rate depends on the step and on this number alone. 0:
    `train.steps`, so that another `train.steps` is another schedule."""
    warmup_steps: int = 0
    """Steps of linear warmup, at most those of the whole schedule. 0: `warmup_fraction` of them."""
    warmup_fraction: float = 0.0
    """Share of the steps that is warmup if `warmup_steps` is 0; works for runs of any length."""
    decay_fraction: float = 0.2
    """Share of the steps in which `wsd` decays."""
    min_lr_fraction: float = 0.0
    """Final learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        between(self, 0, 2**31, "steps", "warmup_steps")
        between(self, 0.0, 1.0, "warmup_fraction", "decay_fraction", "min_lr_fraction")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP)."""
    dp_shard: int = -1
    """Ranks that shard parameters, gradients and optimizer state (FSDP2). -1: all remaining
    ranks."""
    tp: int = 1
    """Tensor parallelism: consecutive ranks that divide attention heads, feed-forward widths and
    the vocabulary, and the tokens between those layers (sequence parallelism)."""
    ep: int = 1
    """Expert parallelism: ranks that divide the experts; they are a subset of the ranks of
    `dp_shard` and `tp`. -1: the largest degree that divides both the number of those ranks and
    `n_experts`."""
    etp: int = 1
    """Tensor parallelism inside the experts: 1 (the ranks of `tp` send different tokens to the
    experts) or `tp` (they divide the width of every expert)."""
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward: less memory, one more all-gather."""
    zero_stage: int = 3
    """What ranks that shard weights keep whole between the microbatches of a step. 3: nothing. 2:
    weights, gathered once per step. 1: also the sums of their gradients, in fp32, reduced once per
    step: the least communication, and the most memory."""
    expert_zero_stage: int = 0
    """The same for the routed experts. 0: `zero_stage`."""
    prefetch: int = 1
    """Blocks whose parameters are gathered ahead of the current one, in forward and backward: the
    gather overlaps with the computation, and the gathered weights use memory."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory and update them there."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Run blocks again in backward instead of keeping their intermediate results. `selective` keeps
    the results of the operations in `recompute_keep`, `full` only the block's input. The expert
    choice is always kept."""
    recompute_keep: tuple[Literal["attention", "matmul", "exchange"], ...] = ("attention", "matmul")
    """selective: operations whose results are kept: torch's fused attention, matrix products,
    communication between ranks."""
    recompute_every: int = 1
    """Recompute the blocks 0, n, 2n, ...; the others keep everything."""
    recompute_swiglu: bool = False
    """Experts keep gate and up and recompute their activation in the backward kernel that reads
    both anyway: 15 to 30 percent less activation memory per expert, and no extra product. Not for
    experts with biases; FP8 always does so."""
    compile: bool = False
    """Compile each block with `torch.compile`; faster on CUDA, rarely on a CPU."""
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)

    def __post_init__(self) -> None:
        between(self, 1, _MOST_RANKS, "dp_replicate", "tp", "etp")
        between(self, 1, 10_000, "recompute_every")
        between(self, 0, 10_000, "prefetch")
        between(self, 1, 3, "zero_stage")
        between(self, 0, 3, "expert_zero_stage")
        if self.recompute == "none" and self.recompute_every > 1:
            raise ConfigError(
                f"recompute_every = {self.recompute_every}: recompute = none recomputes no block; "
                "use selective or full"
            )
        if self.etp not in (1, self.tp):
            raise ConfigError(f"etp = {self.etp}: must be 1 or tp = {self.tp}")
        for key in ("dp_shard", "ep"):
            if getattr(self, key) != -1:
                between(self, 1, _MOST_RANKS, key)

    def stage(self, experts: bool) -> int:
        """The ZeRO stage of the routed experts, or of all other weights."""
        return (self.expert_zero_stage if experts else 0) or self.zero_stage


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    every: int = 0
    """Steps between validations; the last step validates too. 0: only the last step."""
    sequences: int = 0
    """Sequences per validation. 0: all held-out sequences."""

    def __post_init__(self) -> None:
        between(self, 0, 2**31, "every", "sequences")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; the last step and a stop also save one. 0: only those."""
    dir: str = ""
    """Folder of the checkpoints, or the URL of an object store (`s3://bucket/folder`), one for each
    run. Empty: `checkpoints` in `run.dir`."""
    async_save: bool = True
    """Whether steps wait only for a copy of the state to host memory; the copy is written while
    training continues. `--check` prints the size of the copy; without enough memory for it, and at
    the last step, the run waits for the files."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Of steps that are multiples of this, checkpoints are never removed. 0: no such steps."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation loss to keep in addition, among those of
    steps with a validation."""
    init_from: str = ""
    """Start from the weights of this checkpoint (a run folder or one step of it) with a new
    optimizer state at step 0. Ignored once the run has its own checkpoint."""

    def __post_init__(self) -> None:
        between(self, 0, 2**31, "every")
        between(self, 1, 2**31, "keep")
        between(self, 0, 2**31, "keep_every", "keep_best")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One complete, immutable experiment."""

    run: RunConfig
    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        self._check_sizes()
        length = self.schedule.steps or self.train.steps
        if self.schedule.warmup_steps > length:
            raise ConfigError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps}: longer than the "
                f"schedule of {length} steps (train.steps = {self.train.steps}); "
                "lower it, train longer, or give schedule.steps"
            )
        if self.precision.recipe == "fp8_blockwise" and self.parallel.cpu_offload:
            raise ConfigError(
                "parallel.cpu_offload = true: with precision.recipe = 'fp8_blockwise' weights are "
                "quantized and gathered in the device's memory; use 'bf16' or cpu_offload = false"
            )
        if self.precision.moments == "bf16" and max(self.optimizer.beta1, self.optimizer.beta2) > (
            SLOWEST_BF16_DECAY
        ):
            raise ConfigError(
                f"precision.moments = 'bf16': a mean with optimizer.beta1 = {self.optimizer.beta1} "
                f"or beta2 = {self.optimizer.beta2} often changes by less than bf16 can tell; use "
                f"at most {SLOWEST_BF16_DECAY}, or moments = 'fp32'"
            )
        # the settings of a model that is loaded are fixed
        if not self.model.moe.router_learns and not self.checkpoint.init_from:
            raise ConfigError(
                "model.moe.norm_top_k = true with top_k = 1: one score divided by itself is 1 "
                "for every router, so the loss has no gradient for it; use "
                "norm_top_k = false, or a larger top_k"
            )
        if self.parallel.recompute_swiglu and self.model.moe.expert_bias:
            raise ConfigError(
                "parallel.recompute_swiglu: not for experts with biases (model.moe.expert_bias); "
                "use recompute = 'selective' or 'full'"
            )
        if 0 < self.schedule.steps < self.train.steps and self._ends_at_zero():
            raise ConfigError(
                f"schedule.steps = {self.schedule.steps}: the learning rate is 0 from there to "
                f"train.steps = {self.train.steps}; set schedule.min_lr_fraction above 0, or "
                "schedule.steps to at least train.steps"
            )
        beyond = [step for step in self.train.profile_steps if not 1 <= step <= self.train.steps]
        if beyond:
            raise ConfigError(
                f"train.profile_steps = {shown(beyond)}: steps are numbered 1 to "
                f"train.steps = {self.train.steps}"
            )
        if self.precision.fp8.diagnose_every and self.parallel.compile:
            raise ConfigError(
                "precision.fp8.diagnose_every: a compiled block cannot be observed; use 0, or "
                "parallel.compile = false"
            )

    def _check_sizes(self) -> None:
        """Raise ConfigError if a tensor of a forward pass would overflow torch's element count."""
        model, moe = self.model, self.model.moe
        micro_batch, seq_len = self.train.micro_batch, self.data.seq_len
        own = {"train__micro_batch": micro_batch, "data__seq_len": seq_len}
        at_most(2**26, "rows of experts in a pass of a rank", **own, model__moe__top_k=moe.top_k)
        heads = model.attention.n_heads
        at_most(
            2**58, "attention scores", **own, per_query=seq_len, model__attention__n_heads=heads
        )

    def _ends_at_zero(self) -> bool:
        decays = self.schedule.kind != "wsd" or self.schedule.decay_fraction > 0
        return decays and self.schedule.min_lr_fraction == 0


_MOST_RANKS = 2**20
SLOWEST_BF16_DECAY = 0.98
"""bf16 rounds away a change of up to 2^-8, so a mean does not change if a new value differs from it
by less than 2^-8 / (1 - decay): 8 percent at 0.95, 20 at 0.98."""
