"""The gain of each optimization of a training step on a CPU: all of them compared with all but one, interleaved.

Run: python experiments/performance/levers.py [OVERRIDES of `benchmark training`] [keep=false] [json=levers.json]
keep=false measures without `keep_freed_memory`, and only all optimizations together. train.compile=false leaves out the
compiled step.
"""

import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import gpt2.ops.attention
import gpt2.ops.cross_entropy
from gpt2.analysis.tables import as_text, from_to
from gpt2.benchmarks.common import circumstances, headline, interleaved, write_json
from gpt2.benchmarks.contestants import Workload, precisions
from gpt2.cli.compose import compose
from gpt2.config import TrainingBenchmark
from gpt2.runtime.device import keep_freed_memory


@contextmanager
def setting(module, name, value):
    """Change a constant of a module for the duration of a step."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


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
        groups = [{k: group[k] for k in ("params", "weight_decay")} for group in trainer.optimizer.param_groups]
        config = trainer.config
        betas = (config.beta1, config.beta2)
        trainer.optimizer = torch.optim.AdamW(groups, config.learning_rate, betas, config.epsilon, **options)
        return trainer.train_step

    return build


def with_setting(module, name, value):
    def build(trainer):
        def step(batches):
            with setting(module, name, value):
                return trainer.train_step(batches)

        return step

    return build


def chunks(mebibytes):
    return with_setting(gpt2.ops.cross_entropy, "CHUNK_BYTES", {"cpu": mebibytes << 20})


LEVERS = {  # name: a function from a trainer to its step, and changes of its configuration
    "all": (plain, {}),
    "logits of the whole batch": (whole_logits, {}),
    "chunks of 32 MiB": (chunks(32), {}),
    "chunks of 64 MiB": (chunks(64), {}),
    "chunks of 128 MiB": (chunks(128), {}),
    "softmax of a whole chunk": (with_setting(gpt2.ops.cross_entropy, "SOFTMAX_BYTES", 1 << 40), {}),
    "vocabulary not padded": (with_setting(gpt2.ops.cross_entropy, "VOCABULARY_MULTIPLE", {}), {}),
    "PyTorch's attention": (with_setting(gpt2.ops.attention, "MAX_WEIGHT_BYTES", 0), {}),
    "AdamW in a loop": (another_adamw(foreach=False, fused=False), {}),
    "AdamW foreach": (another_adamw(foreach=True), {}),
    "compiled": (plain, {"compile": True}),
}


def main():
    keep = "keep=false" not in sys.argv
    overrides = [word for word in sys.argv[1:] if not word.startswith("keep=")]
    config: TrainingBenchmark = OmegaConf.to_object(compose("benchmark_training", overrides))
    if keep:
        keep_freed_memory()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(config, Path(folder), config.warmup + config.repetitions)
        about = circumstances(workload.device)
        print(headline(about), flush=True)
        for precision in precisions(config, workload.device):
            train = replace(config.train, precision=precision.name, mixed_precision=True)
            levers = dict(LEVERS) if keep else {"all": LEVERS["all"]}
            if config.train.compile is False:
                levers.pop("compiled", None)
            if keep and precision.name == "fp32":
                levers["products by PyTorch's BLAS"] = (by_pytorch, {})
            steps = {
                name: build(workload.trainer(replace(train, **options))) for name, (build, options) in levers.items()
            }
            results[precision.name] = measure(workload, steps)
            print_table(precision.name, results[precision.name])
    memory = "freed memory is reused" if keep else "freed memory returns to the kernel"
    write_json(config.json, {"memory": memory, "overrides": overrides, **about, "step_seconds": results})


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
