"""Train GPT-2 on text: `python train.py --help`."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from gpt2.cli.script import script
from gpt2.config import GPT2Config, TrainRun
from gpt2.errors import UserError
from gpt2.runtime.signals import Interrupted

if TYPE_CHECKING:
    from gpt2.model import GPT2Model
    from gpt2.search.trial import RunningTrial
    from gpt2.tokenizer import GPT2Tokenizer

log = logging.getLogger("gpt2")


@script("train")  # Hydra completes the arguments only of files that contain the text @hydra.main
def main(config: TrainRun, trial: "RunningTrial | None" = None) -> float | None:
    """Train a model and return its best validation loss. In a study, `trial` is the trial that is trained."""
    # imported here, so that --help and configuration errors do not wait for torch
    from gpt2.checkpoint.format import check_memory
    from gpt2.cli.job import output_folder
    from gpt2.cli.messages import announce, conclude, failures_with_advice, run_facts
    from gpt2.cli.resume import saved_settings
    from gpt2.data_loader import get_dataloaders, load_text_data
    from gpt2.distributed.process_group import init_distributed
    from gpt2.generation.text import stream_sample
    from gpt2.tracking.loggers import start_run_loggers
    from gpt2.tracking.tracker import INTERRUPTED, METRICS, Ended, Tracker
    from gpt2.train import Trainer
    from gpt2.training.callbacks import Callback, ConsoleLog, Samples, TrackerLog
    from gpt2.training.profiler import StepProfiler

    folder = output_folder()
    with (
        nullcontext() if trial else failures_with_advice(config, folder),
        init_distributed(config.distributed.timeout, config.train.device) as group,
    ):
        check_memory(config.model, "model")
        model = initial_model(config)  # before the data, which may take hours: a damaged file is an error at once
        with group.local_main_first("data"):
            train_set, val_set, test_set, tokenizer = load_text_data(config.data)
        train_loader, val_loader, _ = get_dataloaders(train_set, val_set, test_set, config.train)
        model = model or new_model(config, tokenizer)

        settings, wandb_id = saved_settings(config)
        tracker, callbacks = Tracker(), list[Callback]()
        if group.is_main:
            tracker = Tracker(folder, about=run_facts(config, model, tokenizer, settings))
            samples = Samples(partial(stream_sample, model, tokenizer, config))
            callbacks = [ConsoleLog(trial.label), trial] if trial else [samples]
            callbacks += [TrackerLog(tracker), *([StepProfiler(folder)] if config.profile else [])]
        if trial:
            trial.tracker = tracker
        checkpoints = str(folder / config.train.checkpoint_dir)
        options = {"run": settings, "group": group, "distributed": config.distributed}
        trainer = Trainer(model, train_loader, val_loader, config.train, checkpoints, callbacks, **options)
        if config.resume:
            trainer.load_checkpoint(config.resume, accept_other_data=config.resume_changes)

        with tracker:
            if group.is_main:
                tracker.external = start_run_loggers(config, folder, tracker.about, wandb_id, trainer.progress.step)
                announce(trainer, config)
            trainer.train()
            if trial:
                return trainer.progress.best_val_loss
            if trainer.interrupted_by:
                tracker.outcome = Ended(INTERRUPTED, 128 + trainer.interrupted_by)
            if group.is_main:
                from gpt2.analysis.plotting import draw_curves  # here: matplotlib would delay the first step by 0.3 s

                draw_curves(folder / METRICS, folder / "curves.png")
        if group.is_main:
            conclude(trainer, tracker, config, folder)
        if trainer.interrupted_by:
            raise Interrupted.by(trainer.interrupted_by)
    return trainer.progress.best_val_loss


def initial_model(config: TrainRun) -> "GPT2Model | None":
    """The model of `train.init_from`, without its weights if the run is resumed; None without `train.init_from`."""
    from gpt2.checkpoint.pretrained import open_model
    from gpt2.model import GPT2Model

    if config.train.init_from is None:
        return None
    if config.resume:
        return GPT2Model(config.model)
    log.info(f"Weights from {config.train.init_from}")
    return open_model(config.train.init_from).build(config.model)


def new_model(config: TrainRun, tokenizer: "GPT2Tokenizer") -> "GPT2Model":
    """A model with random weights and with the vocabulary of the tokenizer."""
    import torch

    from gpt2.model import GPT2Model

    requested, size = config.model.vocab_size, tokenizer.vocab_size
    if requested not in (GPT2Config().vocab_size, size):
        raise UserError(f"model.vocab_size: {requested} is not the tokenizer's {size}; omit it to use the tokenizer's")
    torch.manual_seed(config.train.seed)
    return GPT2Model(replace(config.model, vocab_size=size))


if __name__ == "__main__":
    main()
