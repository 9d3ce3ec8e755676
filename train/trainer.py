"""A run from its config to its last checkpoint.

`Trainer.run` is the main loop: fetch, step, report, validate, save. A step is implemented in
`train.step`, its data in `train.data.batches`, checkpoints in `train.checkpoint.checkpoint`.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import torch

from configs.config_warnings import config_warnings
from configs.errors import UserError
from configs.loader import flatten, to_toml
from configs.parallel_dims import ParallelDims
from configs.paths import local_path
from configs.schema import JobConfig
from models.counts import flops_per_token
from models.fp8 import gemm_shares
from parallel.dispatch.overflow import CapacityOverflow
from parallel.ranks import Ranks, sum_over_ranks
from train.atomic_files import claim, replace_text
from train.build import build_training, shard_model
from train.checkpoint import checkpoint
from train.checkpoint.resume import restore
from train.checkpoint.value_range import values_out_of_range
from train.data.batches import Batch
from train.data.open_run_data import open_run_data
from train.garbage_collection import GarbageCollection
from train.loss import source_losses
from train.optim.optimizer import optimizer_tensors, set_learning_rate
from train.optim.schedule import learning_rate, schedule_steps
from train.profile import profiled
from train.report import environment
from train.report.fp8_report import Fp8Diagnosis
from train.report.metrics import FORCED_BALANCE, ROUTER_LEARNS_NOTHING
from train.report.peak_flops import peak_flops
from train.report.reporter import Reporter
from train.shared_storage import check_shared
from train.step import NonFiniteError, train_step
from train.stop import StopSignal
from train.tokenizer.hf_files import keep_tokenizer
from train.validation import validate_sources


class Trainer:
    """All parts of a run, built for this rank; `run` trains to the last step."""

    def __init__(self, config: JobConfig, parallel_dims: ParallelDims, ranks: Ranks) -> None:
        self.config, self.parallel_dims, self.ranks = config, parallel_dims, ranks
        self.folder = local_path(config.run.dir)
        ranks.on_first(lambda: claim(self.folder))  # before any slow step
        ranks.on_first(lambda: checkpoint.check_folder(self.folder / "checkpoints"))
        check_shared(config, ranks)
        sharded = shard_model(config, ranks)  # raises early for invalid settings
        self.data = open_run_data(config, ranks, lambda line: print(line, flush=True))
        rank, n_ranks = parallel_dims.data_rank(ranks.rank), parallel_dims.data_ranks
        on_cuda = ranks.device.type == "cuda"
        self.batches = self.data.training(config.train.micro_batch, rank, n_ranks, pin=on_cuda)
        self.training = build_training(config, ranks, sharded)
        self.model, self.optimizer = self.training.model, self.training.optimizer
        self.fp8 = Fp8Diagnosis(self.model, config.precision.fp8)
        compute = str(self.training.compute)
        self.facts = {"corpus": self.data.fingerprint, "compute": compute}
        start = restore(config, ranks, self.facts, self._weights, self._optimizer_state)
        self.training.fp8_weights.refresh()
        self.done = self.saved = start.done
        if self.done:
            ranks.on_every(self._check_data)
        self.owes_validation = start.owes_validation
        if ranks.is_first:
            self._introduce(start.lines)

    def run(self) -> int | None:
        """Train up to the last step; returns the exit code of a stop, None when complete."""
        train, total = self.config.train, self.config.train.steps
        schedule, peak = self.config.schedule, self.config.optimizer.lr
        stop, garbage = StopSignal(), GarbageCollection(train.gc_every)
        settings, by_source = self.config.data, self.data.by_source
        data = self.batches.ahead(self.done + 1, total, settings.workers, settings.prefetch)
        with (
            closing(data),
            self._reporter() as report,
            self._saved_where_a_step_fails(report),
        ):
            if self.owes_validation:
                report.amend(self.done, self._validate(stop))
            for step in range(self.done + 1, total + 1):
                start = time.perf_counter()
                batches = [
                    batch.to(self.ranks.device, with_losses=by_source) for batch in next(data)
                ]
                fetched = time.perf_counter()
                lr = learning_rate(schedule, peak, step, schedule_steps(self.config))
                set_learning_rate(self.optimizer, lr)
                with self._profile(step), self.fp8.watching(step):
                    result = train_step(
                        self.model, self.optimizer, batches, step=step, rank=self.ranks.rank,
                        tp_size=self.parallel_dims.tp, clip_norm=train.clip_norm,
                        mtp_weight=train.mtp_weight, z_loss_coef=train.z_loss_coef,
                        stop=stop.agreed, updated=self.training.fp8_weights.refresh,
                    )  # fmt: skip
                if result is None:
                    break
                self.done, end = step, time.perf_counter()
                found = self.fp8.report(step)
                validation = self._validate(stop) if self._due(self.config.validation.every) else {}
                report.step(
                    step, result, lr=lr, seconds=end - start, data_seconds=fetched - start,
                    validation=validation, fp8=found, sources=self._of_sources(batches),
                )  # fmt: skip
                if self._due(self.config.checkpoint.every):
                    self._save(report)
                garbage.run(step)
            self._save(report)
            for picture in report.draw():
                report.say(f"drew {picture}")
        return None if self.done == total and not self.owes_validation else stop.exit_code

    def _due(self, every: int) -> bool:
        return self.done == self.config.train.steps or (every > 0 and self.done % every == 0)

    def _of_sources(self, batches: list[Batch]) -> dict[str, float]:
        """Losses of the step, tokens and epochs by source; nothing for one unnamed source."""
        if not self.data.by_source:
            return {}
        sums = source_losses(batches, len(self.data.sources))
        return self.data.step_fields(self.done, sum_over_ranks(sums), self.parallel_dims.tp)

    def _validate(self, stop: StopSignal) -> dict[str, float]:
        fields = validate_sources(
            self.model, self.data.validated, self.config.validation.sequences,
            self.config.train.micro_batch, self.ranks.device,
            self.parallel_dims.data_rank(self.ranks.rank), self.parallel_dims.data_ranks,
            stop.agreed, self.parallel_dims.tp,
        )  # fmt: skip
        self.owes_validation = fields is None
        return fields or {}

    def _save(self, report: Reporter, keep_all: bool = False) -> None:
        """Write the checkpoint of the last complete step, unless it exists.

        keep_all: remove no older one. Raises NonFiniteError instead of saving values that are not
        finite.
        """
        if self.done == self.saved:
            return
        weights, others = self._weights(), self._optimizer_state()
        if bad := values_out_of_range(weights, others):
            raise NonFiniteError(
                f"step {self.done}: {bad} afterwards; not saved, stopped before the optimizer step "
                f"of step {self.done + 1}",
                weights_are_good=False,
            )
        report.flush()
        path = checkpoint.save(
            self.folder / "checkpoints",
            weights | others,
            {
                "step": self.done,
                "owes_validation": self.owes_validation,
                **self.facts,
                **self.data.state(self.done),
            },
            flatten(self.config),
            None if keep_all else self.config.checkpoint.keep,
            self.ranks,
            report.say,
        )
        self.saved = self.done
        report.say(f"saved {path}")

    @contextmanager
    def _saved_where_a_step_fails(self, report: Reporter) -> Iterator[None]:
        """If the next step fails, save the state after the last one, if that is sound.

        Removes no older checkpoint: these weights may be the cause.
        """
        try:
            yield
        except (NonFiniteError, CapacityOverflow) as error:
            try:
                if not isinstance(error, NonFiniteError) or error.weights_are_good:
                    self._save(report, keep_all=True)
            except (NonFiniteError, UserError) as unsaved:
                report.say(f"not saved: {unsaved}")
            error.args = (f"{error}; {self._newest()}",)
            raise

    def _newest(self) -> str:
        if not self.saved:
            return "there is no checkpoint yet"
        newest = checkpoint.path_of(self.folder / "checkpoints", self.saved)
        return f"the newest checkpoint is {newest}"

    def _weights(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict(keep_vars=True)
        return {f"model.{name}": tensor for name, tensor in state.items()}

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        tensors = optimizer_tensors(self.optimizer)
        return {f"optimizer.{name}": tensor for name, tensor in tensors.items()}

    def _check_data(self) -> None:
        """Raise UserError if the run would read sequences twice, or never."""
        path = checkpoint.path_of(self.folder / "checkpoints", self.done)
        self.data.check_resume(checkpoint.read_manifest(path).state, self.done)

    def _introduce(self, start: list[str]) -> None:
        """Print how the run starts, and save config, tokenizer and environment with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "config.toml", to_toml(self.config))
        data = self.config.data
        keep_tokenizer(
            self.data.tokenizer_file,
            self.folder / "tokenizer",
            data.seq_len,
            trains_on=bool(self.config.checkpoint.init_from),
        )
        described = environment.describe(self.ranks, self.parallel_dims, self.training.compute)
        lines = [*start, *self.data.lines, *environment.record(self.folder, described)]
        moe = self.config.model.moe
        forced = [FORCED_BALANCE] if moe.force_balance else []
        frozen = [] if moe.router_learns else [ROUTER_LEARNS_NOTHING]
        shares = gemm_shares(self.model, self.config.data.seq_len)
        fp8 = [str(shares)] if shares.fp8 else []
        mesh = " x ".join(f"{axis} {size}" for axis, size, _ in self.parallel_dims.table())
        print(
            f"{self.folder}: {self.ranks.world} ranks ({mesh}), {self.ranks.device.type}, "
            f"{str(self.training.compute).removeprefix('torch.')}, "
            f"{torch.get_num_threads()} threads per rank",
            *fp8,
            *forced,
            *frozen,
            *config_warnings(self.config),
            *lines,
            sep="\n",
            flush=True,
        )

    def _reporter(self) -> Reporter:
        return Reporter(
            self.folder,
            self.ranks,
            done=self.done,
            total=self.config.train.steps,
            log_every=self.config.train.log_every,
            flops_per_token=flops_per_token(self.config.model, self.config.data.seq_len),
            peak_flops=peak_flops(self.ranks.device),
            force_balance=self.config.model.moe.force_balance,
        )

    def _profile(self, step: int) -> AbstractContextManager[Any]:
        if step not in self.config.train.profile_steps:
            return nullcontext()
        return profiled(
            self.folder / "profile" / f"step-{step:08d}-rank-{self.ranks.rank:05d}.json"
        )
