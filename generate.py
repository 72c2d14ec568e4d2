"""Write text with a trained model: `python generate.py prompt="..."`."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpt2.cli.script import script
from gpt2.config import GenerateRun
from gpt2.errors import UserError
from gpt2.generation.prompts import read_prompts

if TYPE_CHECKING:
    from gpt2.inference import TextGenerator


@script("generate")
def main(config: GenerateRun) -> None:
    if config.prompt is not None and config.prompts_file is not None:
        raise UserError("prompts_file: there is a prompt= already, drop one of the two")
    if config.prompt is None and config.prompts_file is None and sys.stdin is None:
        raise UserError("prompt: there is none, and standard input is closed")
    records = read_prompts(config.prompts_file) if config.prompts_file is not None else []
    side_by_side = config.inference.num_return_sequences * max(1, len(records))

    from gpt2.inference import TextGenerator
    from gpt2.runtime.device import choose_device
    from gpt2.tracking.tracker import Tracker
    from gpt2.tracking.wandb_logger import comparable, start_wandb

    choose_device(config.device)  # refuses a missing one before any work

    def note(text: object) -> None:
        if not config.quiet:
            print(text, file=sys.stderr)

    if config.quiet:
        logging.getLogger("gpt2").setLevel(logging.WARNING)
    generator = TextGenerator(
        str(config.checkpoint),
        config.device,
        config.inference.precision,
        config.inference.quantization,
        config.inference.compile,
        texts=min(side_by_side, config.batch_size),
        allow_special_tokens=config.allow_special_tokens,
    )
    note(generator.describe())
    if config.prompt is None and not records and sys.stdin.isatty():
        if config.wandb.mode != "off":
            note("W&B gets nothing of a session.")
        generator.interactive_mode(config.inference)
        return
    experiment = generator.trained.experiment
    external = start_wandb(
        config.wandb,
        name=f"{experiment} texts",
        group=experiment,
        job_type="generate",
        run_config=comparable(asdict(config)),
    )
    with Tracker(external=external):
        rows: list[list[str]] = []
        try:
            rows.extend(map(list, write(config, records, generator)))
        finally:  # it may be interrupted
            external.show_table("texts", ["prompt", "text"], rows)
    note(generator.speed)
    if where := external.where():
        note(f"W&B: {where}")


def write(config: GenerateRun, records: list[dict[str, Any]], generator: "TextGenerator") -> Iterator[tuple[str, str]]:
    """Write the texts that were asked for, and yield each prompt with what was written after it."""
    if records:
        of_each = config.inference.num_return_sequences
        continuations = generator.continuations(
            [record["prompt"] for record in records], config.inference, config.batch_size
        )
        for number, continuation in enumerate(continuations):
            line = {**records[number // of_each], **vars(continuation)}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            yield continuation.prompt, continuation.text
    else:
        prompt = sys.stdin.read().removesuffix("\n") if config.prompt is None else config.prompt
        generator.generate_text(prompt, config.inference)
        yield from ((prompt, text) for text in generator.written)


if __name__ == "__main__":
    main()
