"""Write text with a trained model: `python generate.py prompt="..."`."""

import sys

from gpt2.command_line import script
from gpt2.config import GenerateRun


@script("generate")
def main(config: GenerateRun) -> None:
    from gpt2.inference import TextGenerator

    generator = TextGenerator(str(config.checkpoint), config.device)
    print(generator.trained.describe(), file=sys.stderr)
    generator.generate_text(config.prompt, config.inference)


if __name__ == "__main__":
    main()
