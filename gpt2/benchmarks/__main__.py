"""`python -m gpt2.main benchmark WHAT [OVERRIDES]`."""

from gpt2.cli.arguments import take_word
from gpt2.cli.script import script
from gpt2.config import DataBenchmark, GenerationBenchmark, TrainingBenchmark


@script("benchmark_generation")
def benchmark_generation(config: GenerationBenchmark) -> None:
    from gpt2.runtime.device import choose_device

    choose_device(config.device)  # an unavailable device is an error before transformers is imported
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


BENCHMARKS = {
    "generation": (benchmark_generation, "speed of text generation, against transformers"),
    "training": (benchmark_training, "speed of training, against transformers and others"),
    "data": (benchmark_data, "speed of tokenization and of the data loader"),
}


def main() -> None:
    descriptions = {name: description for name, (_, description) in BENCHMARKS.items()}
    name = take_word("benchmark", "python -m gpt2.main benchmark WHAT [OVERRIDES]", descriptions)
    BENCHMARKS[name][0]()


if __name__ == "__main__":
    main()
