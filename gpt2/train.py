"""The training loop."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.config import DistributedConfig, TrainingConfig
from gpt2.data_loader import ShuffledBatches
from gpt2.distributed.parallel import local, strategy
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import DivergenceError, UserError
from gpt2.evaluate import Batch, Score, as_inputs, bytes_of_tokens, count_targets, perplexity, score, validate_data
from gpt2.model import Forward, GPT2Model
from gpt2.ops.linear import LINEARS
from gpt2.runtime.console import ProgressLine
from gpt2.runtime.device import choose_device, peak_flops, precision_asked
from gpt2.runtime.dist_env import division
from gpt2.runtime.rng import RandomState, make_deterministic, seed_of_rank
from gpt2.runtime.signals import defer_signals
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.tracking.tracker import Tracker
from gpt2.training import state as snapshot
from gpt2.training.callbacks import Callback
from gpt2.training.compile import Compiled
from gpt2.training.computation import agreed_precision, choose_computation
from gpt2.training.nonfinite import ADVICE, NonFiniteGuard, gradient_norms
from gpt2.training.optimizer import build_optimizer, learning_rate
from gpt2.training.state import Progress
from gpt2.training.throughput import Throughput
from gpt2.validation import validate, validate_distributed

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model, evaluates it as it goes, and keeps it on disk."""

    def __init__(
        self,
        model: GPT2Model,
        train_loader: DataLoader,
        val_loader: DataLoader,
        config: TrainingConfig,
        checkpoint_dir: str | None = None,
        tracker: Tracker | None = None,
        write_sample: Callable[[int], str] | None = None,
        run: dict[str, Any] | None = None,
        on_evaluation: "Callable[[Trainer], None] | None" = None,
        on_step: Callable[[], None] | None = None,
        group: ProcessGroup | None = None,
        distributed: DistributedConfig | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        """
        Args:
            train_loader, val_loader: Batches as `gpt2.evaluate.as_inputs` takes them.
            checkpoint_dir: Where checkpoints go; `config.checkpoint_dir` if None.
            tracker: Where numbers go; nowhere if None.
            write_sample: Given the step, writes the text that each evaluation shows; no samples if None.
            run: The configuration of the whole run, kept in its checkpoints so that it can be resumed from them.
            on_evaluation: Called after each evaluation, when it is logged and, if it is the best, saved; what it raises
                ends training.
            on_step: Called after each step.
            group: The process group, see `gpt2.distributed.process_group.init_distributed`. Each rank has a trainer,
                with loaders that yield the same batches. Only rank 0 uses `tracker`, `write_sample` and `on_step`,
                and it alone writes files.
            distributed: How they do.
            callbacks: What follows this training, see `gpt2.training.callbacks`.

        Raises:
            UserError: `config` makes no sense, its device is not there, the data have tokens unknown to the model, or
                there are none; or the ranks do not divide a step.
        """
        self.group, distributed = group or ProcessGroup(), distributed or DistributedConfig()
        tokenizer: GPT2Tokenizer | None = getattr(train_loader.dataset, "tokenizer", None)
        found = validate(config, "train.") + validate_data(train_loader, val_loader, config, model, tokenizer)
        found += validate_distributed(distributed, config, self.group.env)
        if found:
            raise UserError(*found)
        if config.deterministic:
            make_deterministic()
        torch.manual_seed(seed_of_rank(config.seed, self.group.rank))  # dropout; a checkpoint restores its own state
        self.config = config
        self.device = choose_device(config.device, "train.device")
        self.model = model.to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.precision = agreed_precision(precision_asked(config), self.device, self.group)
        self.strategy = distributed.strategy
        self.parallel = strategy(self.strategy, self.model, self.precision, self.group)
        self.optimizer = build_optimizer(self.model, config)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.checkpoint_dir = Path(checkpoint_dir or config.checkpoint_dir)
        is_main = self.group.is_main
        self.tracker = (tracker if is_main else None) or Tracker()
        self.write_sample = write_sample if is_main else None
        self.run = run
        self.on_evaluation = on_evaluation
        self.on_step = on_step if is_main else None
        self.callbacks = tuple(callbacks)
        self.label = ""  # in front of the progress line
        self.tokenizer = tokenizer
        self._bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size) if tokenizer else None

        self.steps_per_epoch = -(-len(train_loader) // config.accumulation_steps)
        most_steps = config.max_epochs * self.steps_per_epoch
        self.total_steps = min(config.max_steps or most_steps, most_steps)
        self.compute_as()
        self.progress = Progress()
        self.stop_reason: str | None = None
        self.interrupted_by: int | None = None  # the signal
        self.progress_line = ProgressLine(self.total_steps)
        self.losses_since_log = self._no_losses()
        self.pace = Throughput()
        self._validation_line = 0.0  # when it was last told how far validation is
        self._saved: Progress | None = None  # what the newest checkpoint holds
        self._checksum = 0  # of the data of the newest step: all ranks must have the same
        self._goes_on_here = False  # whether the checkpoints in `checkpoint_dir` are those of this run
        self._spared: set[Path] = set()  # those that are not

    # The loop

    def train(self) -> None:
        """Train until `max_epochs`, `max_steps` or `max_training_hours` is reached, whichever is first, or a signal.

        Ctrl-C, SIGTERM and SIGUSR1 let the step finish and save it; `interrupted_by` then holds the signal. Afterwards
        `stop_reason` says why training ended. `last.pth` exists then, and `best_model.pth` unless it was interrupted
        before any evaluation. Nobody else may write to `checkpoint_dir` meanwhile.

        Raises:
            Divergence: A loss or a gradient became NaN or infinite. Checkpoints from before are intact.
            OSError: There is no room for a checkpoint, or for the metrics. Checkpoints from before are intact.
        """
        self.interrupted_by = None
        if self.group.is_main:
            self._spared = set() if self._goes_on_here else set(run_folder.newest_first(self.checkpoint_dir))
            if self._spared:
                log.warning("%s holds another run: best_model.pth and last.pth become this one's", self.checkpoint_dir)
            run_folder.remove_unfinished(self.checkpoint_dir)
        self.pace.begin(self.progress.seconds, self.progress.tokens)
        self.progress_line = ProgressLine(self.total_steps, self.progress.step, self.label)
        try:
            self._call("on_train_start")
            with defer_signals(self.interrupt), self.progress_line:
                self._train()
        except BaseException as error:
            self._call("on_exception", error)
            raise
        self._call("on_train_end")

    def _train(self) -> None:
        if self._saved:  # the interruption may have come before this step's evaluation, or before it had its names
            self._name_newest()
        if self.progress.step and self.progress.step % self.config.eval_every == 0:
            self._evaluate()
        while not self._should_stop():
            self.train_epoch()
        if self.interrupted_by is None:
            self._evaluate()
        self._save()

    def _call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def interrupt(self, number: int) -> None:
        """Have training end after this step, and say later that the signal of that number was why."""
        self.interrupted_by = number

    def train_epoch(self) -> float:
        """Train on what is left of the epoch, or up to the end of training. Returns the mean of its step losses."""
        losses = self._no_losses()
        self.model.train()
        for micro_batches in self._steps_of_epoch():
            done = self.train_step(micro_batches)
            if done is None:
                break
            step_loss, gradient_norm = done
            losses += _counted(step_loss)
            self._after_step(step_loss, gradient_norm)
            if self._should_stop():
                break
        return _mean(losses)

    def train_step(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor] | None:
        """One update of the weights. Returns its loss and its gradient's norm, on the device: nothing waits for them.

        The loss is the mean over the predicted tokens of all micro-batches together, so how they are cut up does not
        matter, nor which rank computes which. An interruption between two of them gives the step up, and nothing has
        happened; then None. Several ranks finish it, for they have to decide together.

        Raises:
            Divergence: See `NonFiniteGuard.check`.
        """
        passes = self.group.shard(micro_batches, self.config.accumulation_steps)
        before = RandomState.of_torch(self.device) if len(passes) > 1 and self.group.size == 1 else None
        rate = learning_rate(self.progress.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        counts = [count_targets(batch) for batch in micro_batches]
        step_loss = torch.zeros((), device=self.device)
        # Gradients of ranks are averaged, and are to be added up.
        divisor = torch.full((), max(1, sum(counts)) / self.group.size, dtype=torch.float32, device=self.device)
        for number, batch in enumerate(passes):
            if number and before and self.interrupted_by is not None:
                before.restore()
                self.optimizer.zero_grad(set_to_none=True)
                return None
            inputs = {key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()}
            with self.parallel.last_pass(number == len(passes) - 1):
                with self.precision.autocast():
                    _, share = self.forward(**inputs, divisor=divisor, return_logits=False)
                assert share is not None
                self.scaler.scale(share).backward()
            step_loss += share.detach()
        if self.group.size > 1:
            step_loss = self.group.all_reduce_(step_loss) / self.group.size
            self._checksum = sum(int(batch["input_ids"].sum()) for batch in micro_batches)

        self.scaler.unscale_(self.optimizer)
        norms = self.parallel.norms(gradient_norms(self.model))
        gradient_norm = torch.linalg.vector_norm(norms)
        self._clip(gradient_norm)
        if self.nonfinite.check(self._place(len(micro_batches)), step_loss, norms):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        self.progress.advance(len(micro_batches), len(self.train_loader), sum(counts))
        return step_loss, gradient_norm

    def _clip(self, gradient_norm: Tensor) -> None:
        limit = self.config.gradient_clip
        # A CPU need not multiply all gradients by one; a GPU would have to be waited for to know that it is one.
        if limit and (self.device.type != "cpu" or gradient_norm + 1e-6 > limit):
            gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, (limit / (gradient_norm + 1e-6)).clamp(max=1.0))

    def compute_as(self, precision: str | None = None, linear: str | None = None, compiled: bool | None = None) -> None:
        """Settle how a step is computed, see `gpt2.training.computation`; what is None is as `config` says."""
        if self.parallel.shards:  # whose parts of weights come together in one format for good, in code of FSDP's
            precision, compiled = self.precision.name, False
        config, length = self.config, self._block_length()
        tokens = self.total_steps * config.accumulation_steps * config.batch_size * length / self.group.size
        flops = tokens * self.model.flops_per_token(length)
        chosen = choose_computation(config, self.device, flops, self.group, precision, linear, compiled)
        self.precision, self.is_compiled, products = chosen.precision, chosen.compiled, LINEARS[chosen.linear]
        self.scaler = self.precision.scaler()
        self.nonfinite = NonFiniteGuard(self.model, self.optimizer, config, self.scaler.is_enabled())
        self.model.use_linear(LINEARS["PyTorch"] if self.is_compiled else products)
        compute: Forward = self.model
        if self.is_compiled:
            rows = config.batch_size // division(config.accumulation_steps, self.group.size)[1]
            compute = Compiled(self.model, self.device, (rows, length), products)
        self.forward = self.parallel.forward(compute)

    def _block_length(self) -> int:
        return getattr(self.train_loader.dataset, "length", self.model.config.context_length)

    def validate(self) -> float:
        """Mean loss in nats a token over the validation set, or its first `eval_batches` batches.

        NaN if an interruption cut it short.
        """
        return self._score_validation().loss

    def _score_validation(self) -> Score:
        return score(
            self.model,
            self.val_loader,
            self.device,
            self.precision.autocast(),
            self.config.eval_batches,
            go_on=self._show_validation,
            bytes_of_token=self._bytes_of_token,
            group=self.group,
        )

    def _place(self, micro_batches: int) -> str:
        """Which step is under way, and where in the data it is."""
        first = self.progress.position + 1
        batches = f"batch {first}" if micro_batches == 1 else f"batches {first} to {first + micro_batches - 1}"
        return f"step {self.progress.step + 1} ({batches} of epoch {self.progress.epoch + 1})"

    def _no_losses(self) -> Tensor:
        """What `_counted` losses are added to."""
        return torch.zeros(2, device=self.device)

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left of the epoch; the last step may have fewer."""
        sampler = self.train_loader.batch_sampler
        already_seen = self.progress.position
        if isinstance(sampler, ShuffledBatches):
            sampler.epoch, sampler.position = self.progress.epoch, self.progress.position
            already_seen = 0  # the sampler leaves them out itself, without loading them
        batches = islice(self.train_loader, already_seen, None)
        while micro_batches := list(map(as_inputs, islice(batches, self.config.accumulation_steps))):
            yield micro_batches

    def _should_stop(self) -> bool:
        """Whether training ends here; `stop_reason` then says why."""
        self.progress.seconds = self.pace.seconds
        self._agree()
        if self.interrupted_by is not None:
            self.stop_reason = "interrupted"
        elif self.config.max_steps is not None and self.progress.step >= self.config.max_steps:
            self.stop_reason = f"train.max_steps={self.config.max_steps} reached"
        elif self.progress.epoch >= self.config.max_epochs:
            self.stop_reason = f"train.max_epochs={self.config.max_epochs} reached"
        elif self.progress.seconds >= self.config.max_training_hours * 3600:
            self.stop_reason = f"train.max_training_hours={self.config.max_training_hours} reached"
        else:
            self.stop_reason = None
        return self.stop_reason is not None

    def _agree(self) -> None:
        """Have all ranks know what one of them was told or sees: a signal, how late it is, other data than the rest."""
        if self.group.size == 1:
            return
        milliseconds = round(self.progress.seconds * 1000)
        told = self.group.all_gather([self.interrupted_by or 0, milliseconds, self._checksum])
        signals, times, checksums = zip(*told, strict=True)
        if len(set(checksums)) > 1:
            raise UserError("data: the ranks have read other tokens at the same place; their files must be the same")
        self.interrupted_by = max(signals) or None
        self.progress.seconds = max(times) / 1000

    # What happens now and then

    def _after_step(self, step_loss: Tensor, gradient_norm: Tensor) -> None:
        self.losses_since_log += _counted(step_loss)
        step = self.progress.step
        self.progress_line.step(step)
        if self.on_step:
            self.on_step()
        self._call("on_step_end")
        if step % self.config.log_every == 0 or step == 1:
            self._log(gradient_norm)
        if step % self.config.eval_every == 0:
            self._evaluate()
        if step % self.config.save_every == 0:
            self._save()

    def _log(self, gradient_norm: Tensor) -> None:
        """Record the mean loss and the speed since the last time. A loss that is not finite is left out."""
        self.nonfinite.poll()
        loss = _mean(self.losses_since_log)
        self.losses_since_log.zero_()
        tokens_per_second = self.pace.tokens_per_second(self.progress.tokens)
        rate = self.optimizer.param_groups[0]["lr"]
        record = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/grad_norm": float(gradient_norm),
            "train/tokens_per_second": tokens_per_second,
            "train/mfu": self._model_flops_utilization(tokens_per_second),
            "train/epoch": self.progress.epoch + self.progress.position / len(self.train_loader),
        }
        if self.nonfinite.total:
            record["train/steps_left_out"] = self.nonfinite.total
        record = {**self._now(), **record}
        self.tracker.log(record)
        self._call("on_log", record)
        left = self._seconds_left()
        self.progress_line.figures(loss, tokens_per_second, left)
        log.info(
            "step %s/%s  loss %.4f  lr %.2e  grad norm %.2f  %s tokens/s",
            f"{self.progress.step:,}",
            f"{self.total_steps:,}",
            loss,
            rate,
            float(gradient_norm),
            f"{tokens_per_second:,.0f}",
            extra={"on_progress_line": True},
        )

    def _evaluate(self) -> None:
        """Validate, show a sample, and keep the model if it is the best so far. Once a step.

        An interruption gives it up, and nothing has happened: the run that goes on begins with it.
        """
        if self.progress.evaluated_at == self.progress.step:
            return
        self.nonfinite.poll()
        with self.pace.aside(), self.parallel.gathered():
            found = self._score_validation()
            loss, text = found.loss, None
            if self.write_sample and self.interrupted_by is None:
                text = self.write_sample(self.progress.step)
            record: dict[str, Any] = {}
            self._call("extend_evaluation", record)
        self._agree()
        if self.interrupted_by is not None:
            return
        if not isfinite(loss):
            raise DivergenceError(f"step {self.progress.step}: the validation loss is {loss}; {ADVICE}")
        self.progress.evaluated_at, self.progress.val_loss = self.progress.step, loss
        is_best = self.progress.best_val_loss is None or loss < self.progress.best_val_loss
        record = {**self._now(), "val/loss": loss, "val/perplexity": perplexity(loss), **record}
        if self.tokenizer:
            record["val/bits_per_byte"] = found.bits_per_byte
        self.tracker.log(record, sample=text)
        self._call("on_log", record)
        log.info(
            "step %s  validation loss %.4f  perplexity %.2f%s",
            f"{self.progress.step:,}",
            loss,
            perplexity(loss),
            "  (best so far)" if is_best else "",
        )
        if text is not None:
            harmless = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)  # no escape sequences
            log.info("%s", "\n".join(f"    | {line}" for line in harmless.split("\n")))
        if is_best:
            self.progress.best_val_loss = loss
            self._save()
        if self.on_evaluation:
            self.on_evaluation(self)
        self._call("on_evaluation_end", record)

    def _show_validation(self, batch: int, batches: int) -> bool:
        """Tell how far validation is; whether it may go on."""
        self._call("on_validation_batch", batch, batches)
        self.progress_line.show(f"validating {batch:,}/{batches:,}")
        now = time.perf_counter()
        if batch == 0:
            self._validation_line = now
        elif now - self._validation_line > 10:
            log.info("validating: batch %s of %s", f"{batch:,}", f"{batches:,}", extra={"on_progress_line": True})
            self._validation_line = now
        return self.interrupted_by is None

    def _now(self) -> dict[str, Any]:
        self.progress.seconds = self.pace.seconds
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
        }

    def _seconds_left(self) -> float:
        """Until the last step at the speed so far, or until the time is up."""
        steps_left = self.total_steps - self.progress.step
        by_steps = self.progress.seconds / max(1, self.progress.step) * steps_left
        return min(by_steps, self.config.max_training_hours * 3600 - self.progress.seconds)

    def _model_flops_utilization(self, tokens_per_second: float) -> float | None:
        """The share of the chip's limit that goes into the model's own arithmetic; None where the limit is unknown."""
        peak = peak_flops(self.precision)
        flops_per_second = tokens_per_second * self.model.flops_per_token(self._block_length())
        return peak and flops_per_second / (peak * self.group.size)

    # Checkpoints

    def _save(self) -> None:
        """Save, unless nothing has happened since the last time: a large model is not written twice in one step."""
        with self.pace.aside():
            if not self.progress.is_as_in(self._saved):
                self.tracker.flush()  # what a checkpoint knows to be logged must not be lost without it
                self._call("before_checkpoint")
                self.save_checkpoint(run_folder.step_name(self.progress.step))
                self._saved = replace(self.progress)
                self._goes_on_here = True
                self._name_newest()
                self._call("on_checkpoint", self.checkpoint_dir / run_folder.step_name(self.progress.step))
            if self.group.is_main:
                run_folder.prune(self.checkpoint_dir, self.config.keep_checkpoints, self.progress.step, self._spared)

    def _name_newest(self) -> None:
        """Give the newest checkpoint the names under which it is looked for."""
        if not self.group.is_main:
            return
        newest = self.checkpoint_dir / run_folder.step_name(self.progress.step)
        run_folder.add_name(newest, run_folder.LAST)
        if self.progress.is_best():
            run_folder.add_name(newest, run_folder.BEST)

    def save_checkpoint(self, filename: str) -> None:
        """Write everything that resuming and generating need to `checkpoint_dir/filename`: the whole, from all ranks.

        Raises:
            Divergence: A number in it is not finite. Nothing was written.
            OSError: There is no room for it. Nothing was written.
        """
        self.nonfinite.poll()
        self.progress.seconds = self.pace.seconds
        taken = snapshot.take(self)
        if self.group.is_main:
            checkpoint.write_checkpoint(self.checkpoint_dir / filename, *taken)

    def load_checkpoint(self, filepath: str, accept_other_data: bool = False) -> None:
        """Take up a run where `save_checkpoint` left it, and log what is not as it was then.

        Args:
            accept_other_data: Go on with another corpus, from the beginning of the epoch.

        Raises:
            UserError: The file is missing, damaged, or of a model of another shape or of another corpus.
        """
        path = Path(filepath)
        snapshot.restore(self, path, accept_other_data)
        self.pace.begin(self.progress.seconds, self.progress.tokens)
        self._goes_on_here = path.parent.resolve() == self.checkpoint_dir.resolve()
        if path.resolve() == (self.checkpoint_dir / run_folder.step_name(self.progress.step)).resolve():
            self._saved = replace(self.progress)


def _counted(loss: Tensor) -> Tensor:
    """(2,): a loss and 1, to be added up; zeros if it is not finite, for then its step was left out."""
    return torch.where(loss.isfinite(), torch.stack([loss, torch.ones_like(loss)]), 0)


def _mean(losses: Tensor) -> float:
    """Of what `_counted` returned; NaN of nothing."""
    total, count = losses.tolist()
    return total / count if count else nan
