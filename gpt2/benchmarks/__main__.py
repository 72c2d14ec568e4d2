"""`python -m gpt2.main benchmark WHAT [OVERRIDES]`."""

import runpy
from importlib import import_module
from typing import Any

from gpt2.cli.arguments import take_subcommand
from gpt2.cli.script import script
from gpt2.runtime.repository import ROOT

BENCHMARKS = {
    "generation": "speed of text generation, compared with transformers",
    "training": "speed of training, compared with transformers and others",
    "data": "speed of tokenization, compared with transformers",
}


def main() -> None:
    name = take_subcommand("benchmark", "python -m gpt2.main benchmark WHAT [OVERRIDES]", BENCHMARKS)
    if name == "data":
        runpy.run_path(str(ROOT / "experiments/performance/tokenization.py"), run_name="__main__")
        return

    @script(f"benchmark_{name}")
    def run(config: Any) -> None:
        getattr(import_module(f"gpt2.benchmarks.{name}"), name)(config)  # here: it imports transformers

    run()


if __name__ == "__main__":
    main()
