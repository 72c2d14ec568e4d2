"""What train.py prints and records about a run: its facts, its start, its end, and advice after a failure."""

import logging
import math
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from gpt2.checkpoint.pretrained import open_tokenizer
from gpt2.checkpoint.record import Progress, read_record
from gpt2.checkpoint.run_folder import BEST, LAST, best_first, checkpoint_folder_of, newest_first, step_of
from gpt2.cli.compose import as_argument, title
from gpt2.config import USER_KEYS, GPT2Config, TrainRun
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import (
    DivergenceError,
    LostRankError,
    ResourceError,
    UserError,
    counted,
    is_full_disk,
    is_out_of_memory,
    machine_error,
)
from gpt2.evaluate import perplexity
from gpt2.model import GPT2Model, meta_model
from gpt2.runtime.console import time_left
from gpt2.runtime.device import (
    choose_device,
    choose_precision,
    describe,
    hardware,
    keep_freed_memory,
    requested_precision,
)
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.hub import OPENAI
from gpt2.runtime.rng import commit, versions
from gpt2.runtime.waiting import waiting_for
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.tracking.tracker import METRICS, SAMPLES, Tracker, read_metrics
from gpt2.train import Trainer
from gpt2.training.compile import ComputePlan, choose_plan
from gpt2.training.cost import Work, memory_needed, memory_of, time_step

log = logging.getLogger("gpt2")

# Settings that have an effect only with a certain value of another setting.
NEEDED_SETTINGS = {
    **dict.fromkeys(("model.mup_base_width", "model.mup_base_head_width"), "model.parametrization=mup"),
    "data.vocab_size": "data.tokenizer=train",
    "train.decay_fraction": "train.lr_schedule=wsd",
    "train.nonfinite_limit": "train.on_nonfinite=skip",
}


def run_facts(config: TrainRun, model: GPT2Model, tokenizer: GPT2Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """The title, tags, size, tokenizer, machine and configuration of a run, for `run.json` and W&B.

    Args:
        settings: The complete configuration as plain values. In a resumed run it may differ from the one in `.hydra`.
    """
    train, device = config.train, choose_device(config.train.device)
    precision = choose_precision(requested_precision(train), device)
    return {
        "title": title(config.started_with) or config.name,
        "tags": list(dict.fromkeys(config.choices.values())),
        "parameters": model.num_parameters(),
        "flops_per_token": model.flops_per_token(config.data.max_length),
        "tokens_per_step": train.batch_size * train.accumulation_steps * config.data.max_length,
        "tokenizer": tokenizer.fingerprint[:16],
        "repository": commit(),
        "machine": {**hardware(device), "precision": precision.name, "ranks": dist_env().world_size},
        "versions": versions(),
        "config": {**settings, "model": asdict(model.config)},  # with the vocabulary of the tokenizer
    }


def announce(trainer: Trainer, run: TrainRun) -> None:
    """Log the size of model, steps and hardware, and notes on settings that have no effect."""
    config, group, strategy = trainer.config, trainer.group, trainer.distributed.strategy
    length = trainer.train_loader.dataset.length  # type: ignore[attr-defined]
    work = Work(trainer.model, config, length, group.size, trainer.parallel.is_sharded)
    epoch = f"{trainer.steps_per_epoch:,} steps an epoch"
    log.info(size_of_run(work, trainer.plan, strategy, trainer.total_steps, epoch))
    if strategy == "fsdp" and group.size == 1:
        log.info("Note    distributed.strategy=fsdp has no effect in a single process")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not config.auto_resume:
        log.info("Note    without train.auto_resume=true, a restart by torchrun starts this run from the beginning")
    if trainer.progress.step:
        limits = " and ".join(trainer.progress.limits_reached(config))
        finished = f": nothing is left to train ({limits} reached); a larger limit trains longer" if limits else ""
        log.info(f"Resuming after step {trainer.progress.step:,}{finished}")
    for note in notes(run, trainer.total_steps):
        log.info(f"Note    {note}")
    log.info("")


def settings_without_effect(config: TrainRun) -> list[str]:
    """A note on each setting that is not the default but needs another value of another setting."""
    notes = []
    for key, needed in NEEDED_SETTINGS.items():
        value, (other, _, wanted) = attrgetter(key)(config), needed.partition("=")
        if value != attrgetter(key)(TrainRun()) and attrgetter(other)(config) != wanted:
            notes.append(f"{key}={value} has no effect without {needed}")
    return notes


def size_of_run(work: Work, plan: ComputePlan, strategy: str, steps: int | None, limit: str) -> str:
    """The lines that describe a run before it begins: its model, its steps, its hardware and what it costs.

    Args:
        steps: The number of steps; None if it is not known.
        limit: In words, the limit of the run beside steps and hours.
    """
    model, train, why = work.model.config, work.train, ""
    if plan.precision.is_emulated:
        faster = choose_precision("auto", plan.device).name
        why = f", which this device emulates: train.precision={faster} is faster"
    elif requested_precision(train) == "auto" and plan.precision.name == "bf16" and plan.device.type == "cpu":
        why = ", which is faster on this CPU (train.precision=fp32 is exact)"
    ranks = f"{work.ranks} ranks ({strategy}), each on " if work.ranks > 1 else ""
    count, per = (1, " a step") if steps is None else (steps, "")
    memory, available = memory_needed(work, plan), memory_of(plan.device)
    less = "; train.gradient_checkpointing=true and a smaller train.batch_size take less"
    parts = ", ".join(f"{what} {size / 1e9:.2g}" for what, size in memory.items())
    return (
        f"Model   {work.model.num_parameters():,} parameters: {counted(model.num_layers, 'layer')}, "
        f"width {model.d_model}, {counted(model.num_heads, 'head')}, context {model.context_length}, "
        f"vocabulary {model.vocab_size:,}\n"
        f"Run     {'steps' if steps is None else counted(steps, 'step')} of {work.tokens_per_step:,} tokens "
        f"({counted(train.batch_size * train.accumulation_steps, 'block')}), {limit}, "
        f"at most {counted(train.max_training_hours, 'hour')}\n"
        f"On      {ranks}{describe(plan.device)}, {plan.precision.name}{why}\n"
        f"Cost    {count * work.tokens_per_step:,} tokens and {count * work.flops_per_step:.2g} FLOPs{per}\n"
        f"Memory  about {sum(memory.values()) / 1e9:.2g} GB {'' if work.ranks == 1 else 'for each rank '}({parts}); "
        f"there are {available / 1e9:.2g} GB{less if sum(memory.values()) > available else ''}"
    )


def notes(run: TrainRun, steps: int | None) -> list[str]:
    """Notes on probable mistakes: a run or its warm-up is cut short, settings have no effect.

    Args:
        steps: The number of steps of the whole run; None if it is not known.
    """
    train, found = run.train, list[str]()
    if steps is not None and train.warmup_steps > steps:
        found.append(
            f"train.warmup_steps={train.warmup_steps:,} is longer than the run: the learning rate never reaches its "
            f"peak; train.warmup_steps={max(1, steps // 10):,} would be a tenth of the steps"
        )
    if steps is not None and steps < (train.max_steps or 0):
        limits = f"train.max_epochs={train.max_epochs:,}", f"train.max_steps={train.max_steps:,}"
        found.append(f"{limits[0]} ends the run after {steps:,} steps, before {limits[1]}")
    return found + settings_without_effect(run)


def print_plan(config: TrainRun) -> None:
    """Print what a run costs on this machine, without loading its data, and without its model in memory.

    Raises:
        UserError: There is no such device.
    """
    keep_freed_memory()  # as in a run, whose speed is measured
    train, work = config.train, planned_work(config)
    progress = read_record(Path(config.resume))["progress"] if config.resume else asdict(Progress(step=0))
    done = progress["step"]
    steps = None if train.max_steps is None else train.max_steps - done
    plan = planned_computation(work, steps)
    limit = f"at most {train.max_epochs:,} epochs" if config.resume is None else f"{done:,} are done already"
    print(size_of_run(work, plan, config.distributed.strategy, steps, limit), flush=True)
    waiting_for("measuring the speed")
    print(time_of_run(work, plan, steps, progress["seconds"]))
    for note in notes(config, train.max_steps):
        print(f"Note    {note}")


def planned_work(config: TrainRun) -> Work:
    """The `Work` of a configuration. The data are not loaded."""
    env, model = dist_env(), meta_model(replace(config.model, vocab_size=vocabulary_size(config)))
    is_sharded = config.distributed.strategy == "fsdp" and env.world_size > 1
    return Work(model, config.train, config.data.max_length, env.world_size, is_sharded)


def planned_computation(work: Work, steps: int | None) -> ComputePlan:
    """How a number of steps would be computed here.

    Raises:
        UserError: There is no such device.
    """
    flops = (steps or math.inf) * work.flops_per_step / work.ranks
    return choose_plan(work.train, choose_device(work.train.device, "train.device"), flops, ProcessGroup(), None)


def time_of_run(work: Work, plan: ComputePlan, steps: int | None, spent: float) -> str:
    """The line with the estimated duration of a run, from the measured time of a part of a step.

    Args:
        spent: Seconds of the limit that earlier sessions of the run have used.
    """
    timing, hours = time_step(work, plan), work.train.max_training_hours
    left = max(0.0, hours * 3600 - spent)
    if timing is None:
        return "Time    not measured: a layer and the head take more than half of the memory"
    speed = work.tokens_per_step / timing.step
    taken = math.inf if steps is None else steps * timing.step
    duration = f"{taken / 3600:,.0f} hours" if taken > 36000 else time_left(max(taken, 1))
    whole = {"layers": work.model.config.num_layers, "blocks": work.rows, "tokens": work.length}
    sizes = zip((timing.layers, timing.rows, timing.tokens), whole.items(), strict=True)
    parts = [f"{size:,} of {total:,} {what}" for size, (what, total) in sizes if size < total]
    measured = f"from a pass of {', '.join(parts)}" if parts else "from whole passes"
    compiled = " without torch.compile" if plan.compiled else ""
    whole_run = "" if steps is None else f"about {duration} "
    result = f"Time    {whole_run}at {speed:,.0f} tokens/s, estimated {measured}{compiled}, computation only"
    if taken <= left / 2:
        return result
    if taken <= left:
        return f"{result}: with evaluations, train.max_training_hours={hours:g} may end it early"
    return f"{result}; train.max_training_hours={hours:g} ends it after at most {left * speed:,.0f} tokens"


def vocabulary_size(config: TrainRun) -> int:
    """The size of the vocabulary that the model of a run will have, without preparing its data."""
    name = config.data.tokenizer
    if config.resume:
        return read_record(Path(config.resume))["model"]["vocab_size"]
    if config.train.init_from:
        return config.model.vocab_size
    if name in OPENAI:  # known without a download
        return GPT2Config().vocab_size
    return config.data.vocab_size if name == "train" else open_tokenizer(name).vocab_size


def conclude(trainer: Trainer, tracker: Tracker, config: TrainRun, folder: Path) -> None:
    """Log why training stopped, the losses, where the files are, and the next command."""
    losses = [record["val/loss"] for record in read_metrics(folder / METRICS) if record.get("val/loss") is not None]
    duration = time_left(trainer.progress.seconds)
    log.info(f"\nStopped after step {trainer.progress.step:,}, {duration}: {trainer.stop_reason}.")
    if losses:
        shown = losses if len(losses) <= 8 else [*losses[:3], *losses[-4:]]
        course = " -> ".join(f"{loss:.3f}" for loss in shown)
        batches, evaluated = len(trainer.val_loader), config.train.eval_batches
        part = f", {evaluated:,} of {batches:,} batches" if evaluated and evaluated < batches else ""
        result = f"{losses[-1]:.4f} nats a token, perplexity {perplexity(losses[-1]):.2f}{part}"
        log.info(f"  validation loss {result}  ({course})")
    names = [path.name for path in best_first(folder / config.train.checkpoint_dir)]
    checkpoints = ", ".join([*(name for name in (BEST, LAST) if name in names), "step_*.pth"])
    place = os.path.relpath(folder)
    log.info(f"  everything is in {place}:")
    files = [name for name in ("curves.png", SAMPLES, METRICS, "train.log") if (folder / name).exists()]
    log.info(f"    {config.train.checkpoint_dir}/ ({checkpoints}), {', '.join(files)}")
    for line in tracker.external.where():
        log.info(f"  {line}")
    if trainer.interrupted_by:
        same = "the same command line, or  " if config.train.auto_resume else ""
        log.info(f"\nResume with:  {same}{resume_command(folder, config)}")
    else:
        prompt = config.sample_prompt or "The"
        quoted = f'"{prompt}"' if not set(prompt) & set('"$`\\!\n') else shlex.quote(prompt)
        is_default_place = folder.parent.parent == Path("outputs/runs").resolve()  # generate.py searches there
        checkpoint = "" if is_default_place else " " + as_argument("checkpoint", place)
        log.info(f"\nNow try:  python generate.py prompt={quoted}{checkpoint}")


def resume_command(folder: Path, config: TrainRun) -> str:
    """The command that resumes a run, with the settings that are not taken from its checkpoint."""
    values = {"resume": os.path.relpath(folder)}
    values |= {key: value for key in USER_KEYS if (value := attrgetter(key)(config)) != attrgetter(key)(TrainRun())}
    return f"{dist_env().command()} train.py {' '.join(as_argument(key, value) for key, value in values.items())}"


@contextmanager
def failures_with_advice(config: TrainRun, folder: Path) -> Iterator[None]:
    """Turn expected failures (full disk, out of memory, divergence) into a one-line error with the resume command."""
    try:
        yield
    except Exception as error:
        explained = explain_failure(error, config, folder, resume_command(folder, config))
        if explained is None:
            raise
        raise explained from error


def explain_failure(error: Exception, config: TrainRun, folder: Path, command: str) -> UserError | None:
    """The failure in one line, with how to resume; None for a bug.

    Args:
        folder: The run folder.
        command: The command that resumes the run.
    """
    train, problem = config.train, machine_error(error)
    if isinstance(error, DivergenceError):
        slower = f"train.learning_rate={train.learning_rate / 2:g} resume_changes=true"
        return DivergenceError(f"{error}{how_to_resume(folder, f'{command} {slower}')}")
    if isinstance(error, LostRankError):
        return type(error)(f"{error}{how_to_resume(folder, command)}")
    if problem is None:
        return None
    if not is_out_of_memory(error):
        advice = "; free some space" if is_full_disk(error) else ""
        return ResourceError(f"{problem}{advice}{how_to_resume(folder, command)}")
    if train.batch_size == 1 and train.gradient_checkpointing:
        return ResourceError(f"{problem} with the smallest passes; try a smaller model or data.max_length")

    smaller, alternative = "train.gradient_checkpointing=true", ""
    if train.batch_size > 1:
        parts = next(n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0)
        alternative = "" if train.gradient_checkpointing else f", and so does {smaller}"
        batch_size, passes = train.batch_size // parts, train.accumulation_steps * parts
        smaller = f"train.batch_size={batch_size} train.accumulation_steps={passes}"
    return ResourceError(
        f"{problem}. A pass had train.batch_size={train.batch_size} blocks of data.max_length={config.data.max_length} "
        f"tokens, a step had train.accumulation_steps={train.accumulation_steps} passes; {smaller} makes the same "
        f"steps in less memory{alternative}{how_to_resume(folder, f'{command} {smaller} resume_changes=true')}"
    )


def how_to_resume(folder: Path, command: str) -> str:
    """The newest saved step and the command that resumes from it, as the end of a sentence."""
    checkpoints = checkpoint_folder_of(folder)
    paths = newest_first(checkpoints) if checkpoints else []
    steps = [step for path in paths if (step := step_of(path)) is not None]
    return f". Step {steps[0]:,} is saved, resume with: {command}" if steps else ""
