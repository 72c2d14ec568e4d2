"""Train GPT-2 on text: `python train.py --help`."""

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.cli.compose import as_argument, title
from gpt2.cli.messages import explain_failure
from gpt2.cli.script import output_folder, script
from gpt2.config import GPT2Config, TrainRun
from gpt2.errors import UserError
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.signals import Interrupted

log = logging.getLogger("gpt2")

if TYPE_CHECKING:
    from gpt2.model import GPT2Model
    from gpt2.search.trial import RunningTrial
    from gpt2.tokenizer import GPT2Tokenizer
    from gpt2.train import Trainer


@script("train")
def main(config: TrainRun, trial: "RunningTrial | None" = None) -> float | None:
    """Train, and return the best validation loss: what a study minimises, of which this may be a trial."""
    import torch  # here, so that a mistake in the configuration is answered before seconds of imports

    from gpt2.analysis.plotting import draw_curves
    from gpt2.data_loader import get_dataloaders, load_text_data
    from gpt2.distributed.process_group import init_distributed
    from gpt2.generation.text import stream_text
    from gpt2.model import GPT2Model
    from gpt2.runtime.device import keep_freed_memory
    from gpt2.tracking.tracker import INTERRUPTED, METRICS, Ended, Tracker
    from gpt2.train import Trainer

    keep_freed_memory()
    folder = output_folder()
    command = f"{dist_env().command()} train.py {as_argument('resume', os.path.relpath(folder))}"
    with (
        explained(config, folder, command, trial),
        init_distributed(config.distributed.timeout, config.train.device) as group,
    ):
        refuse_second_run(config, folder)
        model = trained_model(config)  # before the data, whose preparation may take hours: the weights may be damaged
        with group.local_main_first("data"):
            train_set, val_set, test_set, tokenizer = load_text_data(config.data)
        train_loader, val_loader, _ = get_dataloaders(train_set, val_set, test_set, config.train)
        if model is None:
            torch.manual_seed(config.train.seed)
            model = GPT2Model(with_vocabulary(config.model, tokenizer))

        def write_sample(step: int) -> str:
            seed = config.train.seed + step
            pieces = stream_text(model, tokenizer, config.sample_prompt, config.inference, seed=seed)
            return config.sample_prompt + "".join(takewhile(lambda _: trainer.interrupted_by is None, pieces))

        kept, wandb_id = settings_to_keep(config)
        tracker = Tracker(folder, about=facts(config, model, {**kept, "model": asdict(model.config)}))
        trainer = Trainer(
            model,
            train_loader,
            val_loader,
            config.train,
            str(folder / config.train.checkpoint_dir),
            tracker,
            write_sample if trial is None else None,  # nobody reads them all
            run=kept,
            group=group,
            distributed=config.distributed,
            callbacks=[trial] if trial else [],
        )
        if config.resume:
            trainer.load_checkpoint(config.resume, accept_other_data=config.resume_changes)
        if not group.is_main:
            trainer.train()
        else:
            with listening(config, trainer, folder, wandb_id):
                trainer.train()
                if trial:
                    return trainer.progress.best_val_loss
                if trainer.interrupted_by:
                    tracker.ended(Ended(INTERRUPTED, 128 + trainer.interrupted_by))
                draw_curves(folder / METRICS, folder / "curves.png")
            conclude(trainer, config, folder, command)
        if trainer.interrupted_by:
            raise Interrupted.by(trainer.interrupted_by)
    return trainer.progress.best_val_loss


def refuse_second_run(config: TrainRun, folder: Path) -> None:
    if config.resume or not (folder / "metrics.jsonl").exists():
        return
    place = os.path.relpath(folder)
    if not config.train.auto_resume:
        raise UserError(f"{folder} already holds a run; go on with it (resume={place}) or take another")
    log.warning(f"Note: {place} holds no checkpoint to go on from: its run begins anew")


def settings_to_keep(config: TrainRun) -> tuple[dict[str, Any], str | None]:
    """The configuration that checkpoints are to hold, and W&B's name for the run if it is gone on with."""
    from gpt2.checkpoint.format import read_record

    kept = asdict(config)
    if not config.resume:
        return kept, None
    record = read_record(Path(config.resume))
    if config.data.tokenizer == config.resume:  # where it was found this time is not where it comes from
        kept["data"]["tokenizer"] = record["run"]["data"]["tokenizer"]
    return kept, record["wandb_id"]


@contextmanager
def listening(config: TrainRun, trainer: "Trainer", folder: Path, wandb_id: str | None) -> Iterator[None]:
    """Have all that a training tells reach its files, the terminal and W&B, to its end."""
    from gpt2.tracking.wandb_logger import start_wandb_for_training
    from gpt2.training.profiler import StepProfiler

    tracker = trainer.tracker
    with ExitStack() as closing:
        if config.profile:
            trainer.on_step = profiler = StepProfiler(folder, trainer.device)
            closing.callback(profiler.close)
        closing.enter_context(tracker)
        tracker.external = start_wandb_for_training(config, folder, tracker.about, wandb_id)
        tracker.cut_back(trainer.progress.step, trainer.progress.evaluated_at)
        announce(trainer)
        yield


@contextmanager
def explained(config: TrainRun, folder: Path, command: str, trial: "RunningTrial | None") -> Iterator[None]:
    """Tell what ends a run and is no bug in a line, with how to go on; a study has its own way with that."""
    try:
        yield
    except Exception as error:
        if trial:
            raise
        told = explain_failure(error, config, folder, command)
        if told is None:
            raise
        raise told from error


def trained_model(config: TrainRun) -> "GPT2Model | None":
    """The model of `train.init_from`, whose configuration ours follows by now; None without."""
    from gpt2.checkpoint.pretrained import open_model
    from gpt2.model import GPT2Model

    if config.train.init_from is None:
        return None
    if config.resume:  # the checkpoint brings the weights
        return GPT2Model(config.model)
    log.info(f"Weights from {config.train.init_from}")
    return open_model(config.train.init_from).build(config.model)


def with_vocabulary(config: GPT2Config, tokenizer: "GPT2Tokenizer") -> GPT2Config:
    """The model's vocabulary is the tokenizer's; a configuration that asks for another one is refused."""
    if config.vocab_size not in (GPT2Config().vocab_size, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size: {config.vocab_size} is not the {tokenizer.vocab_size} tokens of the tokenizer; "
            f"left out, it follows the tokenizer"
        )
    return replace(config, vocab_size=tokenizer.vocab_size)


def facts(config: TrainRun, model: "GPT2Model", settings: dict[str, Any]) -> dict[str, Any]:
    """What tells this run from others, and on what it runs: for `run.json` and W&B.

    Args:
        settings: Its whole configuration, plain; `.hydra` has only that with which it began.
    """
    from gpt2.runtime.device import choose_device, choose_precision, hardware, precision_asked
    from gpt2.runtime.rng import commit, versions

    train, device = config.train, choose_device(config.train.device)
    precision = choose_precision(precision_asked(train), device)
    return {
        "title": title(config.started_with) or config.name,
        "tags": list(dict.fromkeys(config.choices.values())),
        "parameters": model.num_parameters(),
        "flops_per_token": model.flops_per_token(config.data.max_length),
        "tokens_per_step": train.batch_size * train.accumulation_steps * config.data.max_length,
        "repository": commit(),
        "machine": {**hardware(device), "precision": precision.name, "ranks": dist_env().world_size},
        "versions": versions(),
        "config": settings,
    }


def announce(trainer: "Trainer") -> None:
    """Say what is about to happen: size, batch, length, hardware."""
    from gpt2.runtime.device import describe

    config, model = trainer.config, trainer.model.config
    blocks = config.batch_size * config.accumulation_steps
    tokens_per_step = blocks * trainer.train_loader.dataset.length
    is_told = config.precision != "auto" or not config.mixed_precision
    is_by_choice = trainer.precision.name == "bf16" and trainer.device.type == "cpu" and not is_told
    why = ", in which this CPU computes faster (train.precision=fp32 would be exact)" if is_by_choice else ""
    group = trainer.group
    among = f"{group.size} ranks ({trainer.strategy}), each on " if group.size > 1 else ""
    log.info(
        f"Model   {trainer.model.num_parameters():,} parameters: {model.num_layers} layers, width {model.d_model}, "
        f"{model.num_heads} heads, context {model.context_length}, vocabulary {model.vocab_size:,}\n"
        f"Run     {trainer.total_steps:,} steps of {tokens_per_step:,} tokens ({blocks} blocks), "
        f"{trainer.steps_per_epoch:,} steps an epoch, at most {config.max_training_hours:g} hours\n"
        f"On      {among}{describe(trainer.device)}, {trainer.precision.name}{why}"
    )
    if trainer.strategy == "fsdp" and group.size == 1:
        log.info("Note    distributed.strategy=fsdp has nothing to divide: this process is alone")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not config.auto_resume:
        log.info("Note    started again by torchrun, this run would begin anew: train.auto_resume=true has it go on")
    if trainer.progress.step:
        log.info(f"Going on after step {trainer.progress.step:,}")
    if config.warmup_steps > trainer.total_steps:
        log.info(f"Note    train.warmup_steps={config.warmup_steps:,} outlasts the run: the learning rate never peaks")
    log.info("")


def conclude(trainer: "Trainer", config: TrainRun, folder: Path, command: str) -> None:
    """Say how it went, where everything lies, and what to type next."""
    from gpt2.checkpoint.run_folder import BEST, LAST, best_first
    from gpt2.evaluate import perplexity
    from gpt2.runtime.console import time_left
    from gpt2.tracking.tracker import METRICS, read_metrics

    losses = [record["val/loss"] for record in read_metrics(folder / METRICS) if record.get("val/loss") is not None]
    took = time_left(trainer.progress.seconds)
    log.info(f"\nStopped after step {trainer.progress.step:,}, {took}: {trainer.stop_reason}.")
    if losses:
        shown = losses if len(losses) <= 8 else [*losses[:3], *losses[-4:]]
        course = " -> ".join(f"{loss:.3f}" for loss in shown)
        log.info(
            f"  validation loss {losses[-1]:.4f} nats a token, perplexity {perplexity(losses[-1]):.2f}  ({course})"
        )
    names = [path.name for path in best_first(folder / config.train.checkpoint_dir)]
    kept = ", ".join([*(name for name in (BEST, LAST) if name in names), "step_*.pth"])
    place = os.path.relpath(folder)
    log.info(f"  everything is in {place}:")
    log.info(f"    {config.train.checkpoint_dir}/ ({kept}), curves.png, samples.md, metrics.jsonl, train.log")
    if where := trainer.tracker.external.where():
        log.info(f"  W&B: {where}")
    if trainer.interrupted_by:
        same = "the same command line, or alone:  " if config.train.auto_resume else ""
        log.info(f"\nGo on with:  {same}{command}")
    else:
        prompt = config.sample_prompt or "The"
        quoted = f'"{prompt}"' if not set(prompt) & set('"$`\\!\n') else shlex.quote(prompt)
        is_found = folder.parent.parent == Path("outputs/runs").resolve()  # where generate.py looks by itself
        checkpoint = "" if is_found else " " + as_argument("checkpoint", place)
        log.info(f"\nNow try:  python generate.py prompt={quoted}{checkpoint}")


if __name__ == "__main__":
    main()
