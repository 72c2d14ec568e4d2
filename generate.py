"""Generate text with a trained model: `python generate.py prompt="..."`."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpt2.cli.script import script
from gpt2.config import WHEN_LOADED, GenerateRun
from gpt2.errors import UserError
from gpt2.generation.prompts import decode_prompt, read_prompts

if TYPE_CHECKING:
    from gpt2.inference import TextGenerator

log = logging.getLogger("gpt2")  # prints on standard error, because standard output is for the texts


@script("generate")  # Hydra completes the arguments only of files that contain the text @hydra.main
def main(config: GenerateRun) -> None:
    if config.prompt is not None and config.prompts_file is not None:
        raise UserError("prompts_file: contradicts prompt, drop one of the two")
    if config.prompt is None and config.prompts_file is None and sys.stdin is None:
        raise UserError("prompt: missing, and standard input is closed")
    records = read_prompts(config.prompts_file) if config.prompts_file is not None else []
    if config.prompt is None and not records and not sys.stdin.isatty():
        config.prompt = decode_prompt(sys.stdin.buffer.read(), "prompt: standard input").removesuffix("\n")

    # imported here, so that errors of the command line do not wait for torch
    from gpt2.inference import TextGenerator
    from gpt2.runtime.device import choose_device
    from gpt2.tracking.loggers import LoggedRun, comparable, start_loggers
    from gpt2.tracking.tracker import Tracker

    if config.quiet:
        log.setLevel(logging.WARNING)
    choose_device(config.device)  # a device that is not available is an error, before the model is loaded
    generator = TextGenerator(
        str(config.checkpoint),
        config.device,
        **{key: getattr(config.inference, key) for key in WHEN_LOADED},
        texts=min(config.inference.num_return_sequences * max(1, len(records)), config.batch_size),
        allow_special_tokens=config.allow_special_tokens,
    )
    log.info(generator.describe())

    if config.prompt is None and not records:
        if config.loggers and (config.loggers != ["wandb"] or config.wandb.mode != "off"):
            log.info("Interactive sessions are not logged.")
        generator.interactive_mode(config.inference)
        return

    experiment = generator.trained.experiment
    run = LoggedRun(f"{experiment} texts", experiment, "generate", comparable(asdict(config)))
    external = start_loggers(config, run)
    rows: list[list[str]] = []
    with Tracker(external=external):
        try:
            rows.extend(map(list, generate(config, records, generator)))
        finally:  # texts before an interruption are logged too
            external.show_table("texts", ["prompt", "text"], rows)
    log.info(generator.speed)
    for line in external.where():
        log.info(line)


def generate(
    config: GenerateRun, records: list[dict[str, Any]], generator: "TextGenerator"
) -> Iterator[tuple[str, str]]:
    """Print the requested texts, and yield each prompt with its continuation."""
    if records:
        prompts = [record["prompt"] for record in records]
        continuations = generator.continuations(prompts, config.inference, config.batch_size)
        for number, continuation in enumerate(continuations):
            record = records[number // config.inference.num_return_sequences]
            print(json.dumps({**record, **vars(continuation)}, ensure_ascii=False), flush=True)
            yield continuation.prompt, continuation.text
    elif config.prompt is not None:
        generator.generate_text(config.prompt, config.inference)
        yield from ((config.prompt, text) for text in generator.printed)


if __name__ == "__main__":
    main()
