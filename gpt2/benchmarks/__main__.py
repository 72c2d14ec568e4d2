"""`python -m gpt2.benchmarks WHAT [OVERRIDES]`."""

from gpt2.cli.arguments import take_word
from gpt2.cli.script import script
from gpt2.config import DataBenchmark, GenerationBenchmark, StartupBenchmark, TrainingBenchmark

BENCHMARKS = {
    "generation": "how fast text is written, against transformers",
    "training": "how fast a model is trained, against transformers and others",
    "data": "how fast text becomes tokens, and tokens batches",
    "startup": "how long it takes until something happens",
}


@script("benchmark_generation")
def benchmark_generation(config: GenerationBenchmark) -> None:
    from gpt2.runtime.device import choose_device

    choose_device(config.device)  # refuses a missing one before more is imported
    from gpt2.benchmarks import generation

    generation.generation(config)


@script("benchmark_training")
def benchmark_training(config: TrainingBenchmark) -> None:
    from gpt2.runtime.device import choose_device

    choose_device(config.train.device, "train.device")
    from gpt2.benchmarks import training

    training.training(config)


@script("benchmark_data")
def benchmark_data(config: DataBenchmark) -> None:
    from gpt2.benchmarks import data

    data.data(config)


@script("benchmark_startup")
def benchmark_startup(config: StartupBenchmark) -> None:
    from gpt2.benchmarks import startup

    startup.startup(config)


def main() -> None:
    what = take_word("benchmark", "python -m gpt2.main benchmark WHAT [OVERRIDES]", BENCHMARKS)
    {
        "generation": benchmark_generation,
        "training": benchmark_training,
        "data": benchmark_data,
        "startup": benchmark_startup,
    }[what]()


if __name__ == "__main__":
    main()
