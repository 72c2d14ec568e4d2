"""The gain of each optimization of a training step on a CPU: all of them compared with all but one, interleaved.

Run: python experiments/performance/levers.py [OVERRIDES of `benchmark training`] [json=levers.json]
train.compile=false leaves out the compiled step.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch.nn.functional as F
from omegaconf import OmegaConf

import gpt2.ops.attention
import gpt2.ops.cross_entropy
from gpt2.analysis.tables import as_text, from_to
from gpt2.benchmarks.common import circumstances, headline, interleaved, write_json
from gpt2.benchmarks.contestants import Workload, precisions
from gpt2.benchmarks.peers import plain_adamw
from gpt2.cli.compose import compose
from gpt2.config import TrainingBenchmark
from gpt2.runtime.device import keep_freed_memory


def plain(trainer):
    return trainer.train_step


def whole_logits(trainer):
    model = trainer.model
    trainer.forward = lambda **inputs: model(**{**inputs, "return_logits": True})
    return trainer.train_step


def by_pytorch(trainer):
    trainer.model.use_linear(F.linear)
    return trainer.train_step


def another_adamw(**options):
    def build(trainer):
        trainer.optimizer = plain_adamw(trainer.model, trainer.config, **options)
        return trainer.train_step

    return build


def with_constant(module, name, value):
    """A step during which a constant of a module has another value."""
    return lambda trainer: patch.object(module, name, value)(trainer.train_step)


def chunks(mebibytes):
    return with_constant(gpt2.ops.cross_entropy, "CHUNK_BYTES", {"cpu": mebibytes << 20})


LEVERS = {  # name: a function from a trainer to its step
    "all": plain,
    "logits of the whole batch": whole_logits,
    "chunks of 32 MiB": chunks(32),
    "chunks of 64 MiB": chunks(64),
    "chunks of 128 MiB": chunks(128),
    "softmax of a whole chunk": with_constant(gpt2.ops.cross_entropy, "SOFTMAX_BYTES", 1 << 40),
    "vocabulary not padded": with_constant(gpt2.ops.cross_entropy, "VOCABULARY_MULTIPLE", {}),
    "PyTorch's attention": with_constant(gpt2.ops.attention, "MAX_WEIGHT_BYTES", 0),
    "AdamW in a loop": another_adamw(foreach=False, fused=False),
    "AdamW foreach": another_adamw(foreach=True),
    "products by PyTorch's BLAS": by_pytorch,
    "compiled": plain,
}


def main():
    overrides = sys.argv[1:]
    config: TrainingBenchmark = OmegaConf.to_object(compose("benchmark_training", overrides))
    keep_freed_memory()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(config, Path(folder), config.warmup + config.repetitions)
        about = circumstances(workload.device)
        print(headline(about), flush=True)
        left_out = {"compiled"} if config.train.compile is False else set()
        for precision in precisions(config, workload.device):
            train = replace(config.train, precision=precision.name, mixed_precision=True)
            only_fp32 = set() if precision.name == "fp32" else {"products by PyTorch's BLAS"}
            steps = {
                name: build(workload.trainer(replace(train, compile=True) if name == "compiled" else train))
                for name, build in LEVERS.items()
                if name not in left_out | only_fp32
            }
            results[precision.name] = measure(workload, steps)
            print_table(precision.name, results[precision.name])
    write_json(config.json, {"overrides": overrides, **about, "step_seconds": results})


def measure(workload, steps):
    def turn(name):
        count[name] += 1
        began = time.perf_counter()
        loss, _ = steps[name](workload.batches[count[name] % len(workload.batches)])
        loss.item()
        return time.perf_counter() - began

    count = dict.fromkeys(steps, 0)
    for name in steps:
        for _ in range(workload.config.warmup):
            turn(name)
    turns = [lambda name=name: turn(name) for name in steps]
    return dict(zip(steps, interleaved(turns, workload.config.repetitions, "Levers"), strict=True))


def print_table(precision, results):
    best = median(results["all"])
    rows = [
        [name, f"{median(each) * 1e3:,.1f}", from_to([s * 1e3 for s in each], 1), f"{median(each) / best:.2f}"]
        for name, each in results.items()
    ]
    print(f"\n{as_text([[precision, 'ms a step', 'from - to', 'of all'], *rows])}", flush=True)


if __name__ == "__main__":
    main()
