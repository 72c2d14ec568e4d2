"""The training loop."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.record import Progress, read_record
from gpt2.config import DistributedConfig, TrainingConfig
from gpt2.data_loader import ShuffledBatches
from gpt2.distributed.parallel import build_strategy
from gpt2.distributed.process_group import ProcessGroup, lost_ranks_named
from gpt2.errors import DivergenceError, UserError
from gpt2.evaluate import Batch, Score, as_inputs, count_targets, perplexity, score, validate_data
from gpt2.model import Forward, GPT2Model
from gpt2.ops.linear import LINEARS, name_of
from gpt2.runtime.console import progress_shown
from gpt2.runtime.device import choose_device, keep_freed_memory
from gpt2.runtime.dist_env import division
from gpt2.runtime.rng import RandomState, make_deterministic, seed_of_rank, versions
from gpt2.runtime.signals import defer_signals
from gpt2.tasks.run import TaskMetrics
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.training import state as states
from gpt2.training.callbacks import Callback, ConsoleLog
from gpt2.training.compile import Compiled, ComputePlan, choose_plan
from gpt2.training.nonfinite import ADVICE, MeanLoss, NonFiniteGuard, clip_gradients, gradient_norms
from gpt2.training.optimizer import (
    build_optimizer,
    effective_rate,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    stepping,
    use_precision,
)
from gpt2.training.state import RunCheckpoints
from gpt2.training.throughput import Throughput
from gpt2.validation import validate, validate_distributed, validate_parametrization

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model, evaluates it at intervals, and saves checkpoints."""

    stop_reason: str | None = None
    interrupted_by: int | None = None  # signal number
    _data_checksum = 0  # of the newest step; must be the same on all ranks

    def __init__(
        self,
        model: GPT2Model,
        train_loader: DataLoader,
        val_loader: DataLoader,
        config: TrainingConfig,
        checkpoint_dir: str | None = None,
        callbacks: Sequence[Callback] = (),
        run: dict[str, Any] | None = None,
        group: ProcessGroup | None = None,
        distributed: DistributedConfig | None = None,
    ):
        """
        Args:
            train_loader, val_loader: Batches as `gpt2.evaluate.as_inputs` takes them.
            checkpoint_dir: Folder for checkpoints; None: `config.checkpoint_dir`.
            callbacks: See `gpt2.training.callbacks`. A `ConsoleLog` is added if there is none among them.
            run: Configuration of the whole run; saved in checkpoints, so that the run can be resumed from them.
            group: The process group, see `gpt2.distributed.process_group.init_distributed`. Each rank has a Trainer
                with loaders that yield the same batches; only rank 0 writes files.
            distributed: The strategy.

        Raises:
            UserError: Invalid `config`, missing device, empty data, unknown tokens, or a step the ranks cannot divide.
        """
        self.group = group = group or ProcessGroup()
        self.distributed = distributed = distributed or DistributedConfig()
        problems = validate(config, "train.") + validate_data(train_loader, val_loader, config, model)
        problems += validate_distributed(distributed, config, group.env)
        problems += validate_parametrization(model.config, config)
        if problems:
            raise UserError(*problems)
        if config.deterministic:
            make_deterministic()
        torch.manual_seed(seed_of_rank(config.seed, group.rank))  # for dropout; a checkpoint restores its own

        self.config, self.run = config, run
        self.tokenizer: GPT2Tokenizer | None = getattr(train_loader.dataset, "tokenizer", None)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.block_length = getattr(train_loader.dataset, "length", model.config.context_length)
        has_console = any(isinstance(callback, ConsoleLog) for callback in callbacks)
        self.callbacks = [*([] if has_console else [ConsoleLog()]), *callbacks]
        folder = Path(checkpoint_dir or config.checkpoint_dir)
        self.checkpoints = RunCheckpoints(folder, config.keep_checkpoints, group.is_main)

        self.device = choose_device(config.device, "train.device")
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        plan = self._choose_plan()
        self.parallel = build_strategy(distributed.strategy, self.model, plan.precision, group)
        self.optimizer = build_optimizer(self.model, config)
        self._use_plan(plan)

        self.progress = Progress(step=0)
        self.throughput = Throughput()
        self.losses_since_log = MeanLoss(self.device)
        if config.eval_tasks and self.tokenizer:
            self.callbacks.append(TaskMetrics(config, self.tokenizer, model.config.context_length, group))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_loader) // self.config.accumulation_steps)

    @property
    def total_steps(self) -> int:
        steps = self.config.max_epochs * self.steps_per_epoch
        return min(self.config.max_steps or steps, steps)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop

    @progress_shown()
    def train(self) -> None:
        """Train until `max_epochs`, `max_steps` or `max_training_hours` is reached, or a signal arrives.

        After Ctrl-C, SIGTERM or SIGUSR1 the current step is finished and saved; `interrupted_by` is the signal.
        `stop_reason` says why training ended. `last.pth` exists afterwards, and `best_model.pth` unless training was
        interrupted before the first evaluation. No other process may write to `checkpoint_dir` at the same time.

        Raises:
            DivergenceError: A loss or a gradient became NaN or infinite. Earlier checkpoints are intact.
            OSError: The disk is full. Earlier checkpoints are intact.
        """
        self.interrupted_by = None
        self.checkpoints.prepare()
        self.throughput.start(self.progress.seconds, self.progress.tokens)
        try:
            finds_anomalies = self.config.detect_anomaly or torch.is_anomaly_enabled()
            with (
                defer_signals(self.interrupt),
                torch.autograd.set_detect_anomaly(finds_anomalies),
                lost_ranks_named(),
            ):
                self._call("on_train_start")
                self._train()
        except BaseException as error:
            self._call("on_exception", error)
            raise
        self._call("on_train_end")

    def _train(self) -> None:
        # The run may have been killed before its newest checkpoint got its names, or before this step's evaluation.
        if self.progress.same_but_time(self.checkpoints.saved):
            self.checkpoints.add_names(self.progress)
        if self.progress.step and self.progress.step % self.config.eval_every == 0:
            self._evaluate()
        while not self._should_stop():
            self.train_epoch()
        if self.interrupted_by is None:
            self._evaluate()
        self._save()

    def interrupt(self, number: int) -> None:
        """End training after the current step, as the signal of that number does."""
        self.interrupted_by = number

    def train_epoch(self) -> float:
        """Train on the rest of the epoch, or until training ends. Returns the mean of the step losses."""
        losses = MeanLoss(self.device)
        self.model.train()
        for micro_batches in self._steps_of_epoch():
            result = self.train_step(micro_batches)
            if result is None:
                break
            step_loss, gradient_norm = result
            losses.add(step_loss)
            self._after_step(step_loss, gradient_norm)
            if self._should_stop():
                break
        return losses.compute()

    def train_step(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor] | None:
        """Update the weights once. Returns loss and gradient norm as scalars on the device, without waiting for it.

        The loss is the mean over the predicted tokens of all micro-batches and ranks, so that it does not depend on how
        the step is divided. If a signal arrives between two micro-batches of a single process, the step is undone and
        None returned; several ranks finish it, because they must decide together.

        Raises:
            DivergenceError: See `NonFiniteGuard.check`.
        """
        targets = sum(count_targets(batch) for batch in micro_batches)
        rate = learning_rate(self.progress.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)

        with stepping(self.optimizer):
            loss = self._accumulate_gradients(micro_batches, targets)
            if loss is None:
                return None
            self.scaler.unscale_(self.optimizer)
            norms = self.parallel.full_norms(gradient_norms(self.model))
            gradient_norm = torch.linalg.vector_norm(norms)
            clip_gradients(self.model, gradient_norm, self.config.gradient_clip)
            if self.guard.check(self.progress.next_step(len(micro_batches)), loss, norms):
                self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        self.progress.learning_rate = effective_rate(self.progress.step, self.total_steps, self.config)
        self.progress.advance(len(micro_batches), len(self.train_loader), targets)
        return loss, gradient_norm

    def _accumulate_gradients(self, micro_batches: list[Batch], targets: int) -> Tensor | None:
        """Forward and backward passes of this rank. Returns the loss of the whole step; None if it was interrupted."""
        batches = self.group.shard(micro_batches, self.config.accumulation_steps)
        can_undo = len(batches) > 1 and self.group.size == 1
        random_state = RandomState.of_torch(self.device) if can_undo else None
        loss = torch.zeros((), device=self.device)
        # Gradients are averaged over the ranks but must be summed: hence the division by their number.
        divisor = torch.full((), max(1, targets) / self.group.size, dtype=torch.float32, device=self.device)

        for number, batch in enumerate(batches):
            if number and random_state and self.interrupted_by is not None:
                random_state.restore()
                self.optimizer.zero_grad(set_to_none=True)
                return None
            inputs = {key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()}
            with self.parallel.pass_context(number == len(batches) - 1):
                with self.plan.precision.autocast():
                    _, part = self.forward(**inputs, divisor=divisor, return_logits=False)
                assert part is not None
                self.scaler.scale(part).backward()
            loss += part.detach()

        if self.group.size > 1:
            loss = self.group.all_reduce_(loss) / self.group.size
            self._data_checksum = sum(int(batch["input_ids"].sum()) for batch in micro_batches)
        return loss

    def validate(self) -> float:
        """Mean loss in nats a token over the first `eval_batches` batches, or all; NaN if it was interrupted."""
        return self._score_validation().loss

    def _score_validation(self) -> Score:
        def on_batch(batch: int, batches: int) -> bool:
            self._call("on_validation_batch", batch, batches)
            return self.interrupted_by is None

        batches, autocast = self.config.eval_batches, self.plan.precision.autocast()
        return score(self.model, self.val_loader, self.device, autocast, batches, on_batch, self.tokenizer, self.group)

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """The micro-batches of each remaining step of the epoch; the last step may have fewer."""
        sampler = self.train_loader.batch_sampler
        skip = self.progress.position
        if isinstance(sampler, ShuffledBatches):
            sampler.epoch, sampler.position = self.progress.epoch, self.progress.position
            skip = 0  # the sampler starts at the position itself, without loading what comes before
        batches = islice(self.train_loader, skip, None)
        while micro_batches := list(map(as_inputs, islice(batches, self.config.accumulation_steps))):
            yield micro_batches

    def _should_stop(self) -> bool:
        """Whether training ends here; sets `stop_reason`."""
        self.progress.seconds = self.throughput.seconds
        self._synchronize()
        limits = self.progress.limits_reached(self.config)
        reached = f"{limits[0]} reached" if limits else None
        self.stop_reason = reached if self.interrupted_by is None else "interrupted"
        return self.stop_reason is not None

    def _synchronize(self) -> None:
        """Let all ranks agree on signals and time, and check that they read the same data."""
        if self.group.size == 1:
            return
        milliseconds = round(self.progress.seconds * 1000)
        rows = self.group.all_gather([self.interrupted_by or 0, milliseconds, self._data_checksum])
        signals, times, checksums = zip(*rows, strict=True)
        if len(set(checksums)) > 1:
            raise UserError("data: the ranks read different tokens at the same place; their files must be the same")
        self.interrupted_by = max(signals) or None
        self.progress.seconds = max(times) / 1000

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    # -----------------------------------------------------------------------------------------------------------------
    # Logging, evaluation, checkpoints

    def _after_step(self, step_loss: Tensor, gradient_norm: Tensor) -> None:
        self.losses_since_log.add(step_loss)
        step = self.progress.step
        self._call("on_step_end")
        if step % self.config.log_every == 0 or step == 1:
            self._log(gradient_norm)
        if step % self.config.eval_every == 0:
            self._evaluate()
        if step % self.config.save_every == 0:
            self._save()

    def _log(self, gradient_norm: Tensor) -> None:
        """Record mean loss and throughput since the previous record."""
        self.guard.poll()
        tokens_per_second = self.throughput.tokens_per_second(self.progress.tokens)
        flops_per_second = tokens_per_second * self.model.flops_per_token(self.block_length) / self.group.size
        metrics = {
            **self._counters(),
            "train/loss": self.losses_since_log.compute(),
            "train/learning_rate": self.progress.learning_rate,
            "train/grad_norm": float(gradient_norm),
            "train/tokens_per_second": tokens_per_second,
            "train/mfu": self.plan.utilization(flops_per_second),
            "train/epoch": self.progress.epoch + self.progress.position / len(self.train_loader),
            **({"train/steps_left_out": self.guard.total} if self.guard.total else {}),
        }
        self.losses_since_log.reset()
        self._call("on_log", metrics)

    def _evaluate(self) -> None:
        """Validate, and save the model if it is the best so far. Does nothing if this step is already evaluated.

        If a signal interrupts it, its result is discarded; the resumed run starts with this evaluation.
        """
        if self.progress.evaluated_at == self.progress.step:
            return
        self.guard.poll()
        extra: dict[str, Any] = {}
        with self.throughput.pause(), self.parallel.gathered():
            result = self._score_validation()
            self._synchronize()  # callbacks that all ranks have may wait for each other
            if self.interrupted_by is None:
                self._call("extend_evaluation", extra)
        self._synchronize()
        if self.interrupted_by is not None:
            return
        loss = result.loss
        if not isfinite(loss):
            raise DivergenceError(f"step {self.progress.step}: the validation loss is {loss}; {ADVICE}")

        self.progress.evaluated_at, self.progress.val_loss = self.progress.step, loss
        is_best = self.progress.best_val_loss is None or loss < self.progress.best_val_loss
        if is_best:
            self.progress.best_val_loss, self.progress.best_at = loss, self.progress.step
        metrics = {**self._counters(), "val/loss": loss, "val/perplexity": perplexity(loss)}
        if self.tokenizer:
            metrics["val/bits_per_byte"] = result.bits_per_byte
        metrics |= extra
        self._call("on_log", metrics)
        if is_best:
            self._save()
        self._call("on_evaluation_end", metrics)

    def _counters(self) -> dict[str, Any]:
        self.progress.seconds = self.throughput.seconds
        seconds = round(self.progress.seconds, 3)
        return {"step": self.progress.step, "tokens": self.progress.tokens, "seconds": seconds}

    def _save(self) -> None:
        """Save a checkpoint of this step, unless there is one already, and remove old ones."""
        with self.throughput.pause():
            if not self.progress.same_but_time(self.checkpoints.saved):
                self._call("before_checkpoint")
                path = self.checkpoints.path_of(self.progress)
                self.save_checkpoint(path.name)
                self.checkpoints.added(self.progress)
                self._call("on_checkpoint", path)
            self.checkpoints.prune(self.progress)

    def save_checkpoint(self, filename: str) -> None:
        """Write everything that resuming and generating need to `checkpoint_dir/filename`. Called by all ranks.

        Raises:
            DivergenceError: A number in it is not finite. Nothing is written.
            OSError: The disk is full. Nothing is written.
        """
        self.guard.poll()
        self.progress.seconds = self.throughput.seconds
        state = self.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if names := checkpoint.nonfinite_names(tensors):
            raise DivergenceError(f"step {self.progress.step}: {names[0]} is not finite, not saved; {ADVICE}")
        record = {name: value for name, value in state.items() if name not in tensors} | self._description()
        record |= {"run": self.run, "tokenizer": self.tokenizer and self.tokenizer.to_json()}
        for callback in self.callbacks:
            record |= callback.state_dict()
        if self.group.is_main:
            checkpoint.write_checkpoint(self.checkpoints.folder / filename, tensors, record)

    def load_checkpoint(self, filepath: str, accept_other_data: bool = False) -> None:
        """Continue where `save_checkpoint` was called, and log every setting that differs from then.

        Args:
            accept_other_data: Continue with other data, from the start of the epoch.

        Raises:
            UserError: The file is missing or damaged, or of a model of another shape or of other data.
        """
        path = Path(filepath)
        saved = read_record(path)
        states.check_compatible(path, saved, self._description(), accept_other_data)
        states.check_tokenizer(path, saved["tokenizer"], self.tokenizer)
        plan = self._choose_plan(saved["machine"])
        if self.parallel.is_sharded:  # FSDP was set up with a precision
            plan = replace(plan, precision=self.plan.precision)
        self._use_plan(plan)
        states.log_changes(saved, self._description())

        is_same_optimizer = saved["train"]["optimizer"] == self.config.optimizer
        if not is_same_optimizer:
            log.warning("train.optimizer differs from the checkpoint's: the optimizer starts without its state")
        tensors = checkpoint.read_tensors(path)
        states.check_tensors(path, tensors, self.model)
        with states.misfits_refused(path):
            self.load_state_dict({**saved, **tensors}, with_optimizer=is_same_optimizer)
        self.progress = states.restored_progress(saved, self._description())
        if self.progress.position >= len(self.train_loader):
            raise UserError(f"checkpoint: {path}: progress.position: an epoch has {len(self.train_loader)} batches")
        if not self.progress.limits_reached(self.config):
            states.log_raised_rate(self.progress, self.total_steps, self.config)
        self.throughput.start(self.progress.seconds, self.progress.tokens)
        self.checkpoints.loaded(path, self.progress)
        for callback in self.callbacks:
            callback.load_state_dict(saved)

    def _description(self) -> dict[str, Any]:
        """What determines how a training continues, besides its state."""
        return {
            "model": asdict(self.model.config),
            "train": asdict(self.config),
            "data": getattr(self.train_loader.dataset, "fingerprint", None),
            "machine": {
                "device": self.device.type,
                "precision": self.plan.precision.name,
                "linear": name_of(self.model.linear),
                "compiled": self.plan.compiled,
                "chunk_bytes": self.plan.chunk_bytes,
                "threads": torch.get_num_threads(),
                "ranks": self.group.size,
                "strategy": self.distributed.strategy if self.group.size > 1 else None,
            },
            "versions": versions(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of all parts, complete on rank 0 only: tensors and plain values. Called by all ranks."""
        whole = self.parallel.full_tensors
        return {
            **states.with_prefix("model/", whole(self.model.state_dict())),
            **states.with_prefix("optimizer/", whole(optimizer_tensors(self.optimizer, self.model))),
            **states.random_state_dict(self.device, self.group),
            "losses_since_log": self.losses_since_log.totals,
            "progress": asdict(self.progress),
            "steps_left_out": self.guard.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], with_optimizer: bool = True) -> None:
        """Restore what `state_dict` returned on rank 0. Called by all ranks."""
        weights = self.model.state_dict()
        self.model.load_state_dict(self.parallel.local_parts(states.without_prefix("model/", state), weights))
        if with_optimizer:
            tensors = states.without_prefix("optimizer/", state)
            like = {name: weights[name.split("/", 1)[1]] for name in tensors}
            load_optimizer_tensors(self.optimizer, self.model, self.parallel.local_parts(tensors, like))
        if self.scaler.is_enabled() and state["scaler"]:  # this device may need no loss scaling
            self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["steps_left_out"])
        self.losses_since_log.totals.copy_(state["losses_since_log"])
        self.progress = Progress(**state["progress"])
        seed = seed_of_rank(self.config.seed, self.group.rank, self.progress.step)
        states.load_random_state_dict(state, self.device, self.group, seed)

    # -----------------------------------------------------------------------------------------------------------------
    # How steps are computed

    def _choose_plan(self, saved: dict[str, Any] | None = None) -> ComputePlan:
        config, length = self.config, self.block_length
        tokens = self.total_steps * config.accumulation_steps * config.batch_size * length / self.group.size
        flops = tokens * self.model.flops_per_token(length)
        return choose_plan(config, self.device, flops, self.group, saved)

    def _use_plan(self, plan: ComputePlan) -> None:
        self.plan = plan
        self.scaler = plan.precision.scaler()
        use_precision(self.optimizer, plan.precision)
        self.guard = NonFiniteGuard(self.model, self.optimizer, self.config, self.scaler.is_enabled())
        self.model.use_linear(LINEARS["PyTorch" if plan.compiled else plan.linear])
        self.model.chunk_bytes = plan.chunk_bytes
        compute: Forward = self.model
        if plan.compiled:
            rows = self.config.batch_size // division(self.config.accumulation_steps, self.group.size)[1]
            compute = Compiled(self.model, self.device, (rows, self.block_length), LINEARS[plan.linear])
        self.forward = self.parallel.forward(compute)
