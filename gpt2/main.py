"""Every command under one name: `python -m gpt2.main COMMAND [OVERRIDES]`.

Those that are scripts run the script, so that there is one of each; the others are here.
"""

import os
import runpy
import sys
from pathlib import Path

from gpt2.command_line import script
from gpt2.composition import ROOT
from gpt2.config import ExportRun, GenerationBenchmark

COMMANDS = {
    "train": "train a model: train.py",
    "evaluate": "score a trained model on a corpus: evaluate.py",
    "generate": "write text with a trained model: generate.py",
    "optimize": "search hyperparameters: train.py -m hparams_search=optuna",
    "benchmark": "measure speed against transformers: benchmark generation",
    "export": "write a trained model as a Hugging Face folder: checkpoint=RUN_OR_FILE to=FOLDER",
}


def run_script(name: str, *arguments: str) -> None:
    """Run a script of the repository, with some arguments before those of this process."""
    sys.argv = [f"{name}.py", *arguments, *sys.argv[1:]]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


@script("export")
def export(config: ExportRun) -> None:
    from gpt2 import pretrained

    trained = pretrained.open_model(config.checkpoint)
    folder = Path(str(config.to))
    pretrained.export(trained, folder)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{trained.describe()} is now in {os.path.relpath(folder)}: {files}")
    print(f"\nIn Python:  transformers.pipeline('text-generation', {str(folder)!r})")


@script("benchmark_generation")
def benchmark_generation(config: GenerationBenchmark) -> None:
    from gpt2.device import choose_device

    choose_device(config.device)  # refuses a missing one before more is imported
    from gpt2 import benchmark

    benchmark.generation(config)


BENCHMARKS = {"generation": "how fast text is written"}


def take_word(kind: str, usage: str, choices: dict[str, str]) -> str:
    """Take the next word of the command line, a choice of that kind; or else list them, and leave."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in choices:
        del sys.argv[1]
        return word
    asked = word in ("-h", "--help")
    if word and not asked:
        print(f"error: there is no {kind} {word}", file=sys.stderr)
    lines = (f"  {choice:<10} {purpose}" for choice, purpose in choices.items())
    print("\n".join([f"usage: {usage}", "", *lines]), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)


def main() -> None:
    name = take_word("command", "python -m gpt2.main COMMAND [OVERRIDES]", COMMANDS)
    if name == "export":
        export()
    elif name == "benchmark":
        take_word("benchmark", "python -m gpt2.main benchmark WHAT [OVERRIDES]", BENCHMARKS)
        benchmark_generation()
    elif name == "optimize":
        run_script("train", "-m", "hparams_search=optuna")
    else:
        run_script(name)


if __name__ == "__main__":
    main()
