"""Write text with a trained model: `python generate.py prompt="..."`."""

import logging
import sys

from gpt2.command_line import script
from gpt2.config import GenerateRun


@script("generate")
def main(config: GenerateRun) -> None:
    from gpt2.inference import TextGenerator

    def note(text: object) -> None:
        if not config.quiet:
            print(text, file=sys.stderr)

    if config.quiet:
        logging.getLogger("gpt2").setLevel(logging.WARNING)
    generator = TextGenerator(str(config.checkpoint), config.device)
    note(generator.trained.describe())
    if config.prompt is None and sys.stdin.isatty():
        generator.interactive_mode(config.inference)
    else:
        prompt = sys.stdin.read().removesuffix("\n") if config.prompt is None else config.prompt
        generator.generate_text(prompt, config.inference)
        note(generator.speed)


if __name__ == "__main__":
    main()
