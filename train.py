"""Train GPT-2 on text: `python train.py --help`."""

import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.config import GPT2Config, TrainRun, UserError
from gpt2.main import run_folder, script

if TYPE_CHECKING:
    from gpt2.tokenizer import GPT2Tokenizer
    from gpt2.train import Trainer


@script("train")
def main(config: TrainRun) -> float | None:
    """Train, and return the best validation loss: what a sweep minimises."""
    import torch  # here, so that a mistake in the configuration is answered before seconds of imports

    from gpt2.checkpoint import LAST
    from gpt2.data_loader import get_dataloaders, load_text_data
    from gpt2.device import keep_freed_memory
    from gpt2.inference import stream_text
    from gpt2.model import GPT2Model
    from gpt2.tracking import Tracker, start_wandb
    from gpt2.train import Trainer

    keep_freed_memory()
    folder = run_folder()
    if not config.resume and (folder / "metrics.jsonl").exists():
        raise UserError(
            f"{folder} already holds a run; go on with it (resume={os.path.relpath(folder)}) or take another"
        )
    train_set, val_set, test_set, tokenizer = load_text_data(config.data)
    train_loader, val_loader, _ = get_dataloaders(train_set, val_set, test_set, config.train)

    torch.manual_seed(config.train.seed)
    model = GPT2Model(with_vocabulary(config.model, tokenizer))

    def write_sample(step: int) -> str:
        pieces = stream_text(model, tokenizer, config.sample_prompt, config.inference, seed=config.train.seed + step)
        return config.sample_prompt + "".join(pieces)

    settings = asdict(replace(config, model=model.config))
    checkpoint_dir = folder / config.train.checkpoint_dir
    with Tracker(folder, start_wandb(config.wandb, folder, Path("outputs"), config.name, settings)) as tracker:
        trainer = Trainer(
            model,
            train_loader,
            val_loader,
            config.train,
            str(checkpoint_dir),
            tracker,
            write_sample,
            run=asdict(config),
        )
        if config.resume:
            trainer.load_checkpoint(str(checkpoint_dir / LAST))
            tracker.cut_back(trainer.progress.step)
        announce(trainer)
        trainer.train()

    conclude(trainer, config, folder)
    if trainer.interrupted_by:
        sys.exit(128 + trainer.interrupted_by)
    return trainer.progress.best_val_loss


def with_vocabulary(config: GPT2Config, tokenizer: "GPT2Tokenizer") -> GPT2Config:
    """The model's vocabulary follows the tokenizer, unless the configuration asks for a larger one."""
    if config.vocab_size == GPT2Config().vocab_size:
        return replace(config, vocab_size=tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.vocab_size} is less than the {tokenizer.vocab_size} tokens of the tokenizer; "
            f"left out, it follows the tokenizer"
        )
    return config


def announce(trainer: "Trainer") -> None:
    """Say what is about to happen: size, batch, length, hardware."""
    from gpt2.device import describe

    config, model = trainer.config, trainer.model.config
    blocks = config.batch_size * config.accumulation_steps
    tokens_per_step = blocks * trainer.train_loader.dataset.length
    print(
        f"Model   {trainer.model.num_parameters():,} parameters: {model.num_layers} layers, width {model.d_model}, "
        f"{model.num_heads} heads, context {model.context_length}, vocabulary {model.vocab_size:,}\n"
        f"Run     {trainer.total_steps:,} steps of {tokens_per_step:,} tokens ({blocks} blocks), "
        f"{trainer.steps_per_epoch:,} steps an epoch, at most {config.max_training_hours:g} hours\n"
        f"On      {describe(trainer.device)}, {trainer.precision.name}"
    )
    if trainer.progress.step:
        print(f"Going on after step {trainer.progress.step:,}")
    if config.warmup_steps > trainer.total_steps:
        print(f"Note    train.warmup_steps={config.warmup_steps:,} outlasts the run: the learning rate never peaks")
    print(flush=True)


def conclude(trainer: "Trainer", config: TrainRun, folder: Path) -> None:
    """Say how it went, where everything lies, and what to type next."""
    from gpt2.evaluate import perplexity
    from gpt2.tracking import draw_curves, read_metrics, time_left

    metrics = folder / "metrics.jsonl"
    draw_curves(metrics, folder / "curves.png")
    losses = [record["val/loss"] for record in read_metrics(metrics) if record.get("val/loss") is not None]
    print(
        f"\nStopped after step {trainer.progress.step:,}, {time_left(trainer.progress.seconds)}: {trainer.stop_reason}."
    )
    if losses:
        shown = losses if len(losses) <= 8 else [*losses[:3], *losses[-4:]]
        course = " -> ".join(f"{loss:.3f}" for loss in shown)
        print(f"  validation loss {losses[-1]:.4f} nats a token, perplexity {perplexity(losses[-1]):.2f}  ({course})")
    kept = ", ".join(path.name for path in sorted((folder / config.train.checkpoint_dir).glob("*.pth")))
    print(f"  everything is in {folder}:")
    print(f"    {config.train.checkpoint_dir}/ ({kept}), curves.png, samples.md, metrics.jsonl, train.log")
    if where := trainer.tracker.where_in_wandb():
        print(f"  W&B: {where}")
    if trainer.interrupted_by:
        print(f"\nGo on with:  python train.py resume={shlex.quote(str(folder))}")
    else:
        prompt = config.sample_prompt or "The"
        quoted = f'"{prompt}"' if not set(prompt) & set('"$`\\!\n') else shlex.quote(prompt)
        print(f"\nNow try:  python generate.py prompt={quoted}")


if __name__ == "__main__":
    main()
