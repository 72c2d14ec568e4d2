"""The training loop."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2 import checkpoint
from gpt2.config import TrainingConfig, UserError
from gpt2.data_loader import ShuffledBatches
from gpt2.device import choose_device, choose_precision, peak_flops
from gpt2.evaluate import Batch, as_inputs, count_targets, perplexity, score
from gpt2.faults import training_faults
from gpt2.model import GPT2Model
from gpt2.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.tracking import ProgressLine, Tracker

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come: all that a resumed run must know beside tensors."""

    step: int = 0  # optimizer updates made
    epoch: int = 0
    position: int = 0  # batches of this epoch that are used up
    tokens: int = 0  # predicted so far
    seconds: float = 0.0  # spent in `train`, over all resumptions
    steps_since_log: int = 0
    evaluated_at: int = 0  # the step of the newest evaluation
    val_loss: float | None = None
    best_val_loss: float | None = None


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
    ):
        """
        Args:
            train_loader, val_loader: Batches as `gpt2.evaluate.as_inputs` takes them.
            checkpoint_dir: Where checkpoints go; `config.checkpoint_dir` if None.
            tracker: Where numbers go; nowhere if None.
            write_sample: Given the step, writes the text that each evaluation shows; no samples if None.
            run: The configuration of the whole run, kept in its checkpoints so that it can be resumed from them.

        Raises:
            UserError: `config` makes no sense, its device is not there, or the data have tokens unknown to the model.
        """
        tokenizer: GPT2Tokenizer | None = getattr(train_loader.dataset, "tokenizer", None)
        found = training_faults(config)
        if tokenizer and tokenizer.ids_in_use > model.config.vocab_size:
            known = model.config.vocab_size
            found.append(f"model.vocab_size: {known} is less than the {tokenizer.ids_in_use} tokens of the data")
        if found:
            raise UserError(*found)
        torch.manual_seed(config.seed)  # dropout; a checkpoint restores its own state
        self.config = config
        self.device = choose_device(config.device, "train.device")
        self.precision = choose_precision(config.precision if config.mixed_precision else "fp32", self.device)
        self.model = model.to(self.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = self.precision.scaler()
        self.train_loader, self.val_loader = train_loader, val_loader
        self.checkpoint_dir = Path(checkpoint_dir or config.checkpoint_dir)
        self.tracker = tracker or Tracker()
        self.write_sample = write_sample
        self.run = run
        self.tokenizer = tokenizer

        self.steps_per_epoch = -(-len(train_loader) // config.accumulation_steps)
        self.total_steps = min(config.max_steps or self._epoch_limit, self._epoch_limit)
        self.progress = Progress()
        self.stop_reason: str | None = None
        self.interrupted_by: int | None = None  # the signal
        self.progress_line = ProgressLine(self.total_steps)
        self.loss_since_log = torch.zeros((), device=self.device)  # sum over progress.steps_since_log steps
        self._clock = self._log_clock = time.perf_counter()
        self._validation_line = self._clock
        self._gradient_norm = torch.zeros(())  # of the last step
        self._saved: Progress | None = None  # what `last.pth` holds
        self._tokens_at_log = 0

    @property
    def _epoch_limit(self) -> int:
        return self.config.max_epochs * self.steps_per_epoch

    # The loop

    def train(self) -> None:
        """Train until `max_epochs`, `max_steps` or `max_training_hours` is reached, whichever is first, or Ctrl-C.

        Ctrl-C and SIGTERM let the step finish and save it; `interrupted_by` then holds the signal. Afterwards
        `stop_reason` says why training ended. `last.pth` exists then, and `best_model.pth` unless it was interrupted
        before any evaluation.

        Raises:
            UserError: The loss became NaN or infinite. Checkpoints from before are intact.
        """
        self.interrupted_by = None
        self._clock = time.perf_counter() - self.progress.seconds
        self._restart_speed()
        self.progress_line = ProgressLine(self.total_steps, self.progress.step)
        with self._finish_step_on_signal(), self.progress_line:
            if self.progress.step and self.progress.step % self.config.eval_every == 0:
                self._evaluate()  # the interruption may have come before this step's evaluation
            while not self._should_stop():
                self.train_epoch()
            if not self.interrupted_by:
                self._evaluate()
            self._save_last()

    def train_epoch(self) -> float:
        """Train on what is left of the epoch, or up to the end of training. Returns the mean of its step losses."""
        epoch_loss, steps = torch.zeros((), device=self.device), 0
        self.model.train()
        for micro_batches in self._steps_of_epoch():
            step_loss, gradient_norm = self.train_step(micro_batches)
            epoch_loss += step_loss
            steps += 1
            self._after_step(step_loss, gradient_norm)
            if self._should_stop():
                break
        if self.progress.position >= len(self.train_loader):
            self.progress.epoch += 1
            self.progress.position = 0
        return float(epoch_loss / max(1, steps))

    def train_step(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """One update of the weights. Returns its loss and its gradient's norm, on the device: nothing waits for them.

        The loss is the mean over the predicted tokens of all micro-batches together, so how they are cut up does not
        matter.
        """
        rate = learning_rate(self.progress.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        counts = [count_targets(batch) for batch in micro_batches]
        step_loss = torch.zeros((), device=self.device)
        for batch, count in zip(micro_batches, counts, strict=True):
            inputs = {key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()}
            with self.precision.autocast():
                _, loss = self.forward(**inputs)
            share = loss * (count / max(1, sum(counts)))
            self.scaler.scale(share).backward()
            step_loss += share.detach()

        self.scaler.unscale_(self.optimizer)
        limit = self.config.gradient_clip or float("inf")
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        self.progress.step += 1
        self.progress.position += len(micro_batches)
        self.progress.tokens += sum(counts)
        return step_loss, gradient_norm

    def validate(self) -> float:
        """Mean loss in nats a token over the validation set, or its first `eval_batches` batches.

        NaN if an interruption cut it short.
        """
        return score(
            self.model,
            self.val_loader,
            self.device,
            self.precision.autocast(),
            self.config.eval_batches,
            go_on=self._show_validation,
        ).loss

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
        self.progress.seconds = time.perf_counter() - self._clock
        if self.interrupted_by is not None:
            self.stop_reason = "interrupted"
        elif self.config.max_steps is not None and self.progress.step >= self.config.max_steps:
            self.stop_reason = f"train.max_steps={self.config.max_steps} reached"
        elif self.progress.step >= self._epoch_limit:
            self.stop_reason = f"train.max_epochs={self.config.max_epochs} reached"
        elif self.progress.seconds >= self.config.max_training_hours * 3600:
            self.stop_reason = f"train.max_training_hours={self.config.max_training_hours} reached"
        else:
            self.stop_reason = None
        return self.stop_reason is not None

    # What happens now and then

    def _after_step(self, step_loss: Tensor, gradient_norm: Tensor) -> None:
        self.loss_since_log += step_loss
        self.progress.steps_since_log += 1
        self._gradient_norm = gradient_norm
        step = self.progress.step
        self.progress_line.step(step)
        if step % self.config.log_every == 0 or step == 1:
            self._log(gradient_norm)
        if step % self.config.eval_every == 0:
            self._evaluate()
        if step % self.config.save_every == 0:
            self._save_last()

    def _log(self, gradient_norm: Tensor) -> None:
        """Record the mean loss and the speed since the last time."""
        loss = float(self.loss_since_log / self.progress.steps_since_log)
        self._refuse_nonfinite(loss)
        self.loss_since_log.zero_()
        self.progress.steps_since_log = 0
        now = time.perf_counter()
        tokens_per_second = (self.progress.tokens - self._tokens_at_log) / (now - self._log_clock)
        self._restart_speed()

        rate = self.optimizer.param_groups[0]["lr"]
        record = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/grad_norm": float(gradient_norm),
            "train/tokens_per_second": tokens_per_second,
            "train/mfu": self._model_flops_utilization(tokens_per_second),
            "train/epoch": self.progress.epoch + self.progress.position / len(self.train_loader),
        }
        self.tracker.log({**self._now(), **record})
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
        """Validate, show a sample, and keep the model if it is the best so far. Once a step."""
        if self.progress.evaluated_at == self.progress.step:
            return
        began = time.perf_counter()
        loss = self.validate()
        if self.interrupted_by is not None:
            return
        self._refuse_nonfinite(loss)
        self.progress.evaluated_at, self.progress.val_loss = self.progress.step, loss
        is_best = self.progress.best_val_loss is None or loss < self.progress.best_val_loss
        self.tracker.log({**self._now(), "val/loss": loss, "val/perplexity": perplexity(loss)})
        log.info(
            "step %s  validation loss %.4f  perplexity %.2f%s",
            f"{self.progress.step:,}",
            loss,
            perplexity(loss),
            "  (best so far)" if is_best else "",
        )
        if self.write_sample:
            text = self.write_sample(self.progress.step)
            self.tracker.sample(self.progress.step, text)
            harmless = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)  # no escape sequences
            log.info("%s", "\n".join(f"    | {line}" for line in harmless.split("\n")))
        self._log_clock += time.perf_counter() - began  # time that says nothing of the speed of training
        if is_best:
            self.progress.best_val_loss = loss
            self._save_last()
            checkpoint.copy(self.checkpoint_dir / checkpoint.LAST, self.checkpoint_dir / checkpoint.BEST)

    def _show_validation(self, batch: int, batches: int) -> bool:
        """Tell how far validation is; whether it may go on."""
        self.progress_line.show(f"validating {batch:,}/{batches:,}")
        now = time.perf_counter()
        if batch == 0:
            self._validation_line = now
        elif now - self._validation_line > 10:
            log.info("validating: batch %s of %s", f"{batch:,}", f"{batches:,}", extra={"on_progress_line": True})
            self._validation_line = now
        return self.interrupted_by is None

    def _now(self) -> dict[str, Any]:
        self.progress.seconds = time.perf_counter() - self._clock
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
        }

    def _restart_speed(self) -> None:
        self._log_clock, self._tokens_at_log = time.perf_counter(), self.progress.tokens

    def _seconds_left(self) -> float:
        """Until the last step at the speed so far, or until the time is up."""
        steps_left = self.total_steps - self.progress.step
        by_steps = self.progress.seconds / max(1, self.progress.step) * steps_left
        return min(by_steps, self.config.max_training_hours * 3600 - self.progress.seconds)

    def _model_flops_utilization(self, tokens_per_second: float) -> float | None:
        """The share of the chip's limit that goes into the model's own arithmetic; None where the limit is unknown."""
        peak = peak_flops(self.precision)
        context = getattr(self.train_loader.dataset, "length", self.model.config.context_length)
        return peak and tokens_per_second * self.model.flops_per_token(context) / peak

    def _refuse_nonfinite(self, value: float, what: str = "loss") -> None:
        if not isfinite(value):
            raise UserError(
                f"step {self.progress.step}: the {what} is no longer a finite number; "
                f"a smaller train.learning_rate or a longer train.warmup_steps may help "
                f"(checkpoints from before are in {self.checkpoint_dir})"
            )

    @contextmanager
    def _finish_step_on_signal(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM only set `interrupted_by`; a second one acts as it always does."""

        def remember(number: int, _frame: Any) -> None:
            self.interrupted_by = number
            for other, handler in before.items():
                signal.signal(other, handler)
            log.info("Finishing this step, then saving. Once more, and it stops at once.")

        try:
            before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # Checkpoints

    def _save_last(self) -> None:
        """Save, unless nothing has happened since the last time: a large model is not written twice in one step."""
        here = replace(self.progress, seconds=0.0)
        if here != self._saved:
            began = time.perf_counter()
            self.save_checkpoint(checkpoint.LAST)
            self._saved = here
            self._log_clock += time.perf_counter() - began

    def save_checkpoint(self, filename: str) -> None:
        """Write everything that resuming and generating need to `checkpoint_dir/filename`."""
        self._refuse_nonfinite(float(self.loss_since_log))
        if not self.scaler.is_enabled():  # a scaler leaves such a step out by itself
            self._refuse_nonfinite(float(self._gradient_norm), "norm of the gradient")
        self.progress.seconds = time.perf_counter() - self._clock
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, tensor in optimizer_tensors(self.optimizer, self.model).items():
            tensors[f"optimizer/{name}"] = tensor
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["loss_since_log"] = self.loss_since_log
        record = {
            "model": asdict(self.model.config),
            "train": asdict(self.config),
            "run": self.run,
            "tokenizer": self.tokenizer and self.tokenizer.to_json(),
            "data": getattr(self.train_loader.dataset, "fingerprint", None),
            "progress": asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            "torch": torch.__version__,
        }
        checkpoint.write(self.checkpoint_dir / filename, tensors, record)

    def load_checkpoint(self, filepath: str) -> None:
        """Take up a run where `save_checkpoint` left it.

        The loaders must be those of that run, with its batch size and seed: a place in the data is a number of batches.

        Raises:
            UserError: The file is missing, damaged, or of a model of another shape or another corpus.
        """
        path = Path(filepath)
        record = checkpoint.read_record(path)
        if record["model"] != asdict(self.model.config):
            differing = [key for key, value in asdict(self.model.config).items() if record["model"].get(key) != value]
            raise UserError(f"checkpoint: {path} holds a model that differs in {', '.join(differing)}")
        data = getattr(self.train_loader.dataset, "fingerprint", None)
        if record["data"] != data:
            raise UserError(f"checkpoint: {path} was trained on other data (fingerprint {record['data']}, not {data})")
        self.model.load_state_dict(checkpoint.read_tensors(path, "model/"))
        load_optimizer_tensors(self.optimizer, self.model, checkpoint.read_tensors(path, "optimizer/"))
        if self.scaler.is_enabled() and record["scaler"]:  # the other device may need no scaling
            self.scaler.load_state_dict(record["scaler"])
        self.progress = Progress(**record["progress"])
        self._clock = time.perf_counter() - self.progress.seconds
        self.loss_since_log = checkpoint.read_tensors(path, "loss_since_log")[""].to(self.device)
        torch.set_rng_state(checkpoint.read_tensors(path, "rng/cpu")[""])
        if self.device.type == "cuda" and (states := checkpoint.read_tensors(path, "rng/cuda")):
            torch.cuda.set_rng_state(states[""], self.device)
