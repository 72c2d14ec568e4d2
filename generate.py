"""Write text with a trained model: `python generate.py prompt="..."`."""

import sys

from gpt2.config import GenerateRun
from gpt2.main import script


@script("generate")
def main(config: GenerateRun) -> None:
    from gpt2.inference import TextGenerator

    generator = TextGenerator(config.checkpoint or "", config.device)
    progress = generator.record["progress"]
    print(f"{generator.path} (step {progress['step']:,})", file=sys.stderr)
    generator.generate_text(config.prompt, config.inference)


if __name__ == "__main__":
    main()
