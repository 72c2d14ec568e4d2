"""The part `How fast is it`: peak, bandwidth, training, data, decoding; the largest batch size and a command."""

import time
from dataclasses import dataclass, replace
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from gpt2.benchmarks.common import READ_BYTES, matmul_flops, peak_bytes, read_bandwidth, reset_peak
from gpt2.benchmarks.contestants import Contestant, Workload, build_ours
from gpt2.benchmarks.generation import ours
from gpt2.cli.compose import compose
from gpt2.config import GPT2Config, InferenceConfig, TrainingBenchmark, TrainingConfig
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.doctor.environment import find_compiler
from gpt2.doctor.report import MISSING, OK, REPORT, SLOW, WRONG, Check, Machine, Row
from gpt2.generation.decode import CompiledDecoding
from gpt2.inference import precision_of_weights
from gpt2.model import GPT2Model, meta_model
from gpt2.ops.cpu_inference import pack_linears
from gpt2.runtime.device import Precision, free_memory, peak_flops
from gpt2.runtime.hub import OPENAI
from gpt2.training.compile import ComputePlan, chunk_bytes_of
from gpt2.training.cost import Work, largest_batch_size, memory_needed, memory_of

GPT2 = GPT2Config(dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
BLOCKS = {"cuda": (16, 1024), "cpu": (2, 256), "mps": (2, 256)}  # (blocks, tokens per block) of the timed pass
STEPS, MAX_SECONDS = 3, 5.0  # timed steps, after the first step; no step begins after this time
PROMPT_TOKENS, NEW_TOKENS = 16, 32
LOADED_TOKENS, LOADING_SECONDS = 1 << 23, 0.5
RECIPE = "gpt2_124m_fineweb"
MAX_BATCH_SIZE = {"cuda": 64, "cpu": 16, "mps": 16}  # the largest recommended one: more is not faster
USABLE_MEMORY = 0.85  # the rest is for the system, fragmentation and other programs

# Limits beyond which a row is `slow`; docs/doctor.md explains them.
MIN_SHARE_OF_DATA_SHEET = 0.6
MIN_BF16_GAIN = 1.2  # over fp32
MIN_BYTES_PER_SECOND = {"cuda": 200e9, "cpu": 8e9, "mps": 0}
MIN_MFU = 0.4
MIN_SHARE_OF_FLOOR = 0.3  # share of the tokens per second that reading the weights allows
PEAK_TO_FORMULA = {"cuda": (0.9, 1.1), "cpu": (0.5, 1.3)}  # lowest and highest measured peak memory
MAX_HOURS = 1000


def shown(number: float, unit: str) -> str:
    """Return a number with an SI prefix, such as 440 GFLOP/s."""
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    prefix, size = next((pair for pair in prefixes if number >= pair[1]), ("", 1))
    return f"{number / size:,.{0 if number / size >= 100 else 1}f} {prefix}{unit}"


# ---------------------------------------------------------------------------------------------------------------------
# The hardware


@cache
def product_rates(machine: Machine) -> dict[str, float]:
    """Measured FLOP/s of large matrix products, by precision."""
    names = dict.fromkeys(("fp32", machine.precision.name))
    return {name: matmul_flops(Precision(name, machine.device)) for name in names}


def check_products(machine: Machine) -> Row:
    rates, name = product_rates(machine), machine.precision.name
    value = ", ".join(f"{key} {shown(rate, 'FLOP/s')}" for key, rate in rates.items())
    sheet = peak_flops(machine.precision)
    if sheet:
        value += f": {rates[name] / sheet:.0%} of the data sheet's {shown(sheet, 'FLOP/s')}"
        advice = "the clock is throttled (nvidia-smi -q -d PERFORMANCE), or another program uses the GPU"
        status = OK if rates[name] >= MIN_SHARE_OF_DATA_SHEET * sheet else SLOW
        return Row(value, status, advice, f"{MIN_SHARE_OF_DATA_SHEET:.0%} of the data sheet", rates)
    is_slow = machine.device.type == "cpu" and name == "bf16" and rates["bf16"] < MIN_BF16_GAIN * rates["fp32"]
    advice = "bf16 is hardly faster than fp32 here: measure again on an idle machine, or use train.precision=fp32"
    return Row(value, SLOW if is_slow else OK, advice, f"bf16 {MIN_BF16_GAIN} times as fast as fp32", rates)


@cache
def bandwidth(machine: Machine) -> float:
    """Measure the bytes per second at which memory is read; the best of six times."""
    size = READ_BYTES * (8 if machine.device.type == "cuda" else 1)
    memory = torch.ones(size // 4, device=machine.device)
    return max(read_bandwidth(memory) for _ in range(6))


def check_bandwidth(machine: Machine) -> Row:
    measured, floor = bandwidth(machine), MIN_BYTES_PER_SECOND[machine.device.type]
    status = OK if measured >= floor else SLOW
    advice = "another program uses the memory too, or too few memory channels are in use"
    return Row(f"{shown(measured, 'B/s')} read", status, advice, shown(floor, "B/s"), {"bytes_per_second": measured})


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Steps:
    """Measurements of some steps of training, after the first step."""

    tokens: int  # tokens per step
    seconds: float  # time of the fastest step
    flops_per_token: float
    loss: float
    needed_bytes: float  # computed by the formula
    peak_bytes: int  # measured

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def plan_of(machine: Machine) -> ComputePlan:
    chunk_bytes = chunk_bytes_of(machine.device)
    return ComputePlan(machine.device, machine.precision, "PyTorch", compiled=False, chunk_bytes=chunk_bytes)


def needed_for(machine: Machine, rows: int, tokens: int) -> float:
    """Return the bytes that training GPT-2 124M needs, by the formula of `plan=true`."""
    work = Work(meta_model(GPT2), TrainingConfig(batch_size=rows), tokens)
    return sum(memory_needed(work, plan_of(machine)).values())


def train_steps(machine: Machine, rows: int, tokens: int, compiled: bool | str) -> Steps:
    """Time steps of GPT-2 124M on random tokens, with the Trainer of train.py."""
    device = machine.device
    settings: dict[str, Any] = {"batch_size": rows, "precision": machine.precision.name, "compile": compiled}
    train = TrainingConfig(device=str(device), num_workers=0, **settings)
    workload = Workload(TrainingBenchmark(replace(GPT2, context_length=tokens), train), machine.folder, STEPS + 1)
    free_memory()
    reset_peak(device)
    before = peak_bytes(device)
    contestant = Contestant("gpt2", machine.precision, partial(build_ours, workload, train))
    contestant.prepare()
    contestant.time_steps()
    seconds = [contestant.time_steps()]
    while len(seconds) < STEPS and sum(seconds) < MAX_SECONDS:
        seconds.append(contestant.time_steps())
    return Steps(
        tokens=workload.tokens_per_step,
        seconds=min(seconds),
        flops_per_token=workload.flops_per_token,
        loss=contestant.loss,
        needed_bytes=needed_for(machine, rows, tokens),
        peak_bytes=peak_bytes(device) - before,
    )


@cache
def timed_steps(machine: Machine) -> Steps | None:
    """Time steps of the size in `BLOCKS` for the device; None if they do not fit into memory."""
    rows, tokens = BLOCKS[machine.device.type]
    fits = needed_for(machine, rows, tokens) <= USABLE_MEMORY * memory_of(machine.device)
    return train_steps(machine, rows, tokens, "auto") if fits else None


def not_measured(machine: Machine) -> Row:
    needed = needed_for(machine, *BLOCKS[machine.device.type])
    return Row(f"not measured: it takes {needed / 1e9:.1f} GB", MISSING, "train a smaller model: model=gpt2_mini")


def check_training(machine: Machine) -> Row:
    if (steps := timed_steps(machine)) is None:
        return not_measured(machine)
    rows, tokens = BLOCKS[machine.device.type]
    name = machine.precision.name
    peak = peak_flops(machine.precision) or product_rates(machine)[name]
    mfu = steps.tokens_per_second * steps.flops_per_token / peak
    value = f"{steps.tokens_per_second:,.0f} tokens/s ({rows} x {tokens} a step, {name}), MFU {mfu:.0%}"
    figures = {**vars(steps), "tokens_per_second": steps.tokens_per_second, "mfu": mfu}
    if not 0 < steps.loss < inf:
        return Row(f"{value}, but the loss is {steps.loss}", WRONG, REPORT, "a finite loss", figures)
    advice = "look for other programs (top, nvidia-smi), then for the slowest operations: train.py profile=true"
    return Row(value, OK if mfu >= MIN_MFU else SLOW, advice, f"MFU {MIN_MFU:.0%}", figures)


def check_memory(machine: Machine) -> Row | None:
    """Compare the peak memory of training with the formula by which the rows below are computed."""
    on_cuda = machine.device.type == "cuda"
    if not (on_cuda or (machine.device.type == "cpu" and Path("/proc/self/clear_refs").exists())):
        return None
    if (steps := timed_steps(machine)) is None:
        return not_measured(machine)
    rows, tokens = BLOCKS[machine.device.type]
    if on_cuda:  # on a CPU, the largest pass would take minutes
        rows, tokens = largest(machine, GPT2), GPT2.context_length
        steps = train_steps(machine, rows, tokens, compiled=False)
    share, (low, high) = steps.peak_bytes / steps.needed_bytes, PEAK_TO_FORMULA[machine.device.type]
    value = f"{steps.peak_bytes / 1e9:.2f} GB for {rows} x {tokens} tokens, {share:.0%} of the formula's"
    advice = "the batch sizes below are wrong by this factor: please report it"
    figures = {"peak_bytes": steps.peak_bytes, "needed_bytes": steps.needed_bytes}
    # On a CPU, swapped memory and other allocators change what is measured.
    status = OK if low <= share <= high else WRONG if on_cuda else SLOW
    return Row(value, status, advice, f"{low:.0%} to {high:.0%}", figures)


def check_loader(machine: Machine) -> Row:
    """Compare the tokens per second of the training loader with those of training."""
    rows, tokens = BLOCKS[machine.device.type]
    file = machine.folder / "loaded.bin"
    np.random.default_rng(0).integers(GPT2.vocab_size, size=LOADED_TOKENS + 1, dtype=np.uint16).tofile(file)
    blocks = TokenDataset(file, "uint16", tokens)
    loader, _, _ = get_dataloaders(blocks, blocks, blocks, TrainingConfig(batch_size=rows, device=str(machine.device)))
    batches = iter(loader)
    next(batches)  # starts the workers
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > LOADING_SECONDS:
            break
    rate = count * rows * tokens / (time.perf_counter() - began)
    value, figures = shown(rate, "tokens/s"), {"tokens_per_second": rate}
    if (steps := timed_steps(machine)) is None:
        return Row(value, figures=figures)
    ratio = rate / steps.tokens_per_second
    status = OK if ratio > 1 else SLOW
    advice = "training waits for data: more train.num_workers, or the tokens on a faster disk (data.cache_dir)"
    return Row(f"{value}, {ratio:,.0f} x what training takes", status, advice, "more than 1 x", figures)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def check_decoding(machine: Machine) -> Row:
    """Time greedy decoding of one text, and compare with the time of reading all weights once per token."""
    precision = precision_of_weights(InferenceConfig().precision, machine.device)
    free_memory()
    model = GPT2Model(GPT2).to(machine.device, precision.dtype).eval()
    weights = model.num_parameters() - model.position_embedding.weight.numel()
    pack_linears(model)  # packed weights are no parameters
    compiled = CompiledDecoding() if machine.device.type == "cuda" and find_compiler() else None
    generate, ids = ours(model, compiled), torch.zeros(1, PROMPT_TOKENS, dtype=torch.long, device=machine.device)
    generate(ids, NEW_TOKENS)  # compiles
    seconds = min(generate(ids, NEW_TOKENS).step_seconds for _ in range(2))
    share = weights * precision.dtype.itemsize / bandwidth(machine) / seconds
    how = f"{precision.name}{', compiled' if compiled else ''}"
    value = f"{1 / seconds:,.1f} tokens/s ({how}), {share:.0%} of what reading the weights allows"
    advice = "look for other programs (top, nvidia-smi); inference.quantization=int8 reads fewer bytes on a CPU"
    figures = {"tokens_per_second": 1 / seconds, "share_of_floor": share}
    status = OK if share >= MIN_SHARE_OF_FLOOR else SLOW
    return Row(value, status, advice, f"{MIN_SHARE_OF_FLOOR:.0%}", figures)


# ---------------------------------------------------------------------------------------------------------------------
# The largest batch size, and a command


def largest(machine: Machine, model: GPT2Config, **fields: Any) -> int:
    """Return the largest `train.batch_size` by the formula, for whole contexts."""
    available = USABLE_MEMORY * memory_of(machine.device)
    train = TrainingConfig(**fields)
    return largest_batch_size(meta_model(model), train, model.context_length, plan_of(machine), available)


def check_sizes(machine: Machine) -> Row:
    names = [name.replace("-", "_") for name in OPENAI]
    found: dict[str, dict[str, int]] = {
        key: {name: largest(machine, model_named(name), gradient_checkpointing=key != "plain") for name in names}
        for key in ("plain", "gradient_checkpointing")
    }
    plain, again = (", ".join(f"{name} {rows or 'none'}" for name, rows in rows.items()) for rows in found.values())
    value = f"{plain}; with train.gradient_checkpointing=true {again}"
    status = OK if found["gradient_checkpointing"]["gpt2"] else MISSING
    return Row(value, status, "no size of GPT-2 can be trained here: model=gpt2_mini", figures=found)


def model_named(name: str) -> GPT2Config:
    config: Any = OmegaConf.to_object(compose("train", [f"model={name}"]).model)
    return config


def recommended(machine: Machine, blocks: int, ranks: int) -> list[str] | None:
    """Return the words of a command that trains GPT-2 124M by the recipe; None if nothing fits.

    Args:
        blocks: Blocks per step of the recipe.
    """
    model = model_named("gpt2")
    fitting = min(largest(machine, model), MAX_BATCH_SIZE[machine.device.type])
    more = [] if fitting else ["train.gradient_checkpointing=true"]
    fitting = fitting or min(largest(machine, model, gradient_checkpointing=True), 16)
    rows = max((n for n in range(1, fitting + 1) if blocks // ranks % n == 0), default=None)
    if rows is None:
        return None
    start = ["python"] if ranks == 1 else ["torchrun", f"--nproc_per_node={ranks}"]
    sizes = [f"train.batch_size={rows}", f"train.accumulation_steps={blocks // rows}"]
    return [*start, "train.py", f"experiment={RECIPE}", "model=gpt2", *sizes, *more]


def check_command(machine: Machine) -> Row:
    gpus = torch.cuda.device_count() if machine.device.type == "cuda" and machine.device.index is None else 1
    recipe = compose("train", [f"experiment={RECIPE}"])
    blocks = recipe.train.batch_size * recipe.train.accumulation_steps
    ranks = max(n for n in range(1, gpus + 1) if blocks % n == 0)
    words = recommended(machine, blocks, ranks)
    small = "python train.py experiment=quickstart"
    if words is None:
        return Row("GPT-2 124M does not fit", MISSING, "the command below fits anywhere", figures={"command": small})
    command, tokens = " ".join(words), recipe.train.max_steps * blocks * GPT2.context_length
    if (steps := timed_steps(machine)) is None:
        return Row("the command below; its time was not measured", figures={"command": command})
    hours = tokens / steps.tokens_per_second / ranks / 3600
    amount = f"{tokens / 1e9:.1f} billion tokens"
    value = f"about {hours:,.0f} hours for the {amount} of {command}"
    advice = "that is for GPUs; the command below and experiment=finetune_shakespeare take minutes"
    status = OK if hours < MAX_HOURS else SLOW
    figures = {"command": command if status == OK else small, "hours": hours}
    return Row(value, status, advice, f"less than {MAX_HOURS:,} hours", figures)


CHECKS: dict[str, Check] = {
    "matrix products": check_products,
    "memory bandwidth": check_bandwidth,
    "training 124M": check_training,
    "its memory": check_memory,
    "loading data": check_loader,
    "decoding 124M": check_decoding,
    "largest batch_size": check_sizes,
    "model=gpt2": check_command,
}
