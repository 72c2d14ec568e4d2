"""Time `inference.speculate=prompt_lookup` with a trained model on greedy text, which repeats itself, and sampled text.

python experiments/generation/speculation.py --checkpoint outputs/runs/quickstart/... \
    --json experiments/generation/speculation.json
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpt2.benchmarks.common import interleaved
from gpt2.config import InferenceConfig
from gpt2.generation.text import Speed
from gpt2.inference import TextGenerator
from gpt2.runtime.device import hardware

PROMPTS = ["def read_lines(path):\n", "class Queue:\n", "import os, sys\n", "def main():\n"]
SAMPLING = {
    "greedy": {"do_sample": False, "repetition_penalty": 1.0},
    "temperature 0.8": {"temperature": 0.8, "repetition_penalty": 1.0},
    "temperature 1, nothing filtered": {"temperature": 1.0, "repetition_penalty": 1.0, "top_k": None, "top_p": None},
}
TOKENS, REPETITIONS, THREADS = 200, 5, 2
FORMATS = {"fp32": {}, "bf16": {"precision": "bf16"}, "int8": {"quantization": "int8"}}


def generated(generator: TextGenerator, config: InferenceConfig) -> tuple[Speed, list[str]]:
    texts = [continuation.text for continuation in generator.continuations(PROMPTS, config, batch_size=1)]
    return generator.speed, texts


def tokens_per_second(speed: Speed) -> float:
    return (speed.new_tokens - speed.texts) / speed.decode_seconds


def compare(checkpoint: str, name: str, sampling: str) -> dict[str, Any]:
    plain, speculative = (
        TextGenerator(checkpoint, "cpu", **FORMATS[name], speculate=value) for value in (None, "prompt_lookup")
    )
    config = InferenceConfig(max_new_tokens=TOKENS, stop_at_end_of_text=False, seed=1, **SAMPLING[sampling])
    turns = [partial(generated, one, config) for one in (plain, speculative)]
    without, with_lookup = interleaved(turns, REPETITIONS, f"{name}, {sampling}")
    drafts = with_lookup[0][0].drafts
    speeds = [median(tokens_per_second(speed) for speed, _ in each) for each in (without, with_lookup)]
    return {
        "format": name,
        "sampling": sampling,
        "tokens_per_second": speeds[0],
        "tokens_per_second_with_lookup": speeds[1],
        "ratio": speeds[1] / speeds[0],
        "tokens_per_pass": with_lookup[0][0].new_tokens / drafts.passes,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "same_texts": without[0][1] == with_lookup[0][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = []
    for name in FORMATS:
        for sampling in SAMPLING:
            row = compare(options.checkpoint, name, sampling)
            rows.append(row)
            speeds = f"{row['tokens_per_second']:7.1f} -> {row['tokens_per_second_with_lookup']:7.1f} tokens/s"
            passes = f"{row['ratio']:.2f} x, {row['tokens_per_pass']:.2f} tokens a pass"
            accepted = f"{row['accepted'] / max(1, row['drafted']):.0%} of {row['drafted']} drafted tokens accepted"
            print(f"{name:<5}{sampling:<32}{speeds}, {passes}, {accepted}, same texts: {row['same_texts']}", flush=True)
    about = {"machine": hardware(torch.device("cpu")), "torch": torch.__version__, "checkpoint": options.checkpoint}
    options.json.write_text(json.dumps({**about, "tokens": TOKENS, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
