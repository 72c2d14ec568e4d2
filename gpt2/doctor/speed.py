"""How fast is it: peak and bandwidth, a step of GPT-2 124M, decoding, data; the batch that fits and the command."""

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
from gpt2.benchmarks.contestants import Contestant, Workload, build_ours, in_precision
from gpt2.benchmarks.decoding import ours
from gpt2.cli.compose import compose, merged
from gpt2.config import GPT2Config, InferenceConfig, TrainingBenchmark, TrainingConfig
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.doctor.environment import find_compiler
from gpt2.doctor.report import MISSING, OK, REPORT, SLOW, WRONG, Check, Machine, Row
from gpt2.generation.decode import CompiledDecoding
from gpt2.model import GPT2Model, meta_model
from gpt2.ops.cpu_inference import pack_linears
from gpt2.runtime.device import (
    Precision,
    auto_without_training,
    choose_precision,
    computes_in_bf16,
    free_memory,
    peak_flops,
)
from gpt2.runtime.hub import OPENAI
from gpt2.training.compile import ComputePlan, chunk_bytes_of
from gpt2.training.cost import Work, largest_batch_size, memory_needed, memory_of

NO_DROPOUT: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
GPT2 = GPT2Config(**NO_DROPOUT)
BLOCKS = {"cuda": (16, 1024)}  # rows and tokens of the passes that are timed
FEW_BLOCKS = (2, 256)  # on other devices
STEPS, LONG = 3, 5.0  # that are timed after a first one, but none is begun after so many seconds
PROMPT, NEW_TOKENS = 16, 32
LOADED_TOKENS, LOADING_SECONDS = 1 << 23, 0.5
RECIPE = "gpt2_124m_fineweb"
MOST_ROWS, FEW_ROWS = {"cuda": 64}, 16  # of a recommended pass: larger ones are not faster

# Shares and floors below which a row is `slow`; docs/doctor.md explains them.
OF_DATA_SHEET = 0.6
BF16_GAIN = 1.2  # over fp32
BYTES_PER_SECOND = {"cuda": 200e9, "cpu": 8e9}
MFU = 0.4
OF_FLOOR = 0.3  # of the tokens per second that reading the weights allows
OF_FORMULA = {"cuda": (0.9, 1.1), "cpu": (0.5, 1.3)}  # peak memory that was measured
OF_MEMORY = 0.85  # the rest is for the system, fragmentation and others
LONG_HOURS = 1000


def shown(number: float, unit: str) -> str:
    """A number with a prefix of the International System: 440 GFLOP/s."""
    prefix = next((p for p, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= size), "")
    size = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}[prefix]
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
        advice = "clocks are throttled (nvidia-smi -q -d PERFORMANCE), or another program uses the GPU"
        state = OK if rates[name] >= OF_DATA_SHEET * sheet else SLOW
        return Row(value, state, advice, f"{OF_DATA_SHEET:.0%} of the data sheet", rates)
    is_slow = machine.device.type == "cpu" and computes_in_bf16() and rates["bf16"] < BF16_GAIN * rates["fp32"]
    advice = "bf16 is hardly faster than fp32 here: measure again on an idle machine; train.precision=fp32 is exact"
    return Row(value, SLOW if is_slow else OK, advice, f"bf16 {BF16_GAIN} times as fast as fp32", rates)


@cache
def bandwidth(machine: Machine) -> float:
    """Bytes per second at which memory is read, the best of a few times."""
    size = READ_BYTES * (8 if machine.device.type == "cuda" else 1)
    memory = torch.ones(size // 4, device=machine.device)
    return max(read_bandwidth(memory) for _ in range(6))


def check_bandwidth(machine: Machine) -> Row:
    measured, floor = bandwidth(machine), BYTES_PER_SECOND.get(machine.device.type, 0)
    advice = "another program reads the memory too, or too few memory channels are in use"
    state = OK if measured >= floor else SLOW
    figures = {"bytes_per_second": measured}
    return Row(f"{shown(measured, 'B/s')} read", state, advice, f"{shown(floor, 'B/s')}", figures)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Steps:
    """Some steps of training, after the first."""

    tokens: int  # of each
    seconds: float  # of the fastest
    flops_per_token: float
    loss: float
    needed_bytes: float  # by the formula
    peak_bytes: int  # by measurement

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def plan_of(machine: Machine) -> ComputePlan:
    plan = ComputePlan(machine.device, machine.precision, "PyTorch", compiled=False)
    return replace(plan, chunk_bytes=chunk_bytes_of(machine.device))


def needed_for(machine: Machine, model: GPT2Config, rows: int, tokens: int, **fields: Any) -> float:
    """The bytes of a training by the formula of `plan=true`."""
    work = Work(meta_model(model), TrainingConfig(batch_size=rows, **fields), tokens)
    return sum(memory_needed(work, plan_of(machine)).values())


def train_steps(machine: Machine, rows: int, tokens: int, compiled: bool | str) -> Steps:
    """Train GPT-2 124M as train.py does, on random tokens."""
    device = machine.device
    model = replace(GPT2, context_length=tokens)
    settings = TrainingConfig(batch_size=rows, device=str(device), num_workers=0, compile=compiled)
    train = in_precision(settings, machine.precision.name)
    workload = Workload(TrainingBenchmark(model, train), machine.folder, STEPS + 1)
    free_memory()
    reset_peak(device)
    before = peak_bytes(device)
    contestant = Contestant("gpt2", machine.precision, partial(build_ours, workload, train))
    contestant.prepare()
    _, *seconds = [contestant.turn(workload, number, 1) for number in range(2)]
    while len(seconds) < STEPS and sum(seconds) < LONG:
        seconds.append(contestant.turn(workload, 1 + len(seconds), 1))
    peak = peak_bytes(device) - before
    needed = needed_for(machine, model, rows, tokens)
    return Steps(workload.tokens_per_step, min(seconds), workload.flops_per_token, contestant.loss, needed, peak)


def fits(machine: Machine, needed: float) -> bool:
    return needed <= OF_MEMORY * memory_of(machine.device)


def too_large(needed: float) -> Row:
    return Row(f"not measured: it takes {needed / 1e9:.1f} GB", MISSING, "train a smaller model: model=gpt2_mini")


@cache
def timed_steps(machine: Machine) -> Steps:
    return train_steps(machine, *BLOCKS.get(machine.device.type, FEW_BLOCKS), "auto")


def check_training(machine: Machine) -> Row:
    rows, tokens = BLOCKS.get(machine.device.type, FEW_BLOCKS)
    if not fits(machine, needed := needed_for(machine, GPT2, rows, tokens)):
        return too_large(needed)
    steps = timed_steps(machine)
    peak = peak_flops(machine.precision) or product_rates(machine)[machine.precision.name]
    mfu, wanted = steps.tokens_per_second * steps.flops_per_token / peak, MFU
    value = (
        f"{steps.tokens_per_second:,.0f} tokens/s ({rows} x {tokens} a step, {machine.precision.name}), MFU {mfu:.0%}"
    )
    figures = {**vars(steps), "tokens_per_second": steps.tokens_per_second, "mfu": mfu}
    if not 0 < steps.loss < inf:
        return Row(f"{value}, but the loss is {steps.loss}", WRONG, REPORT, "a finite loss", figures)
    advice = "look for other programs (top, nvidia-smi), then for the costliest operations: train.py profile=true"
    return Row(value, OK if mfu >= wanted else SLOW, advice, f"MFU {wanted:.0%}", figures)


def check_memory(machine: Machine) -> Row | None:
    """The peak of a training against the formula that the sizes below are computed by."""
    on_cuda = machine.device.type == "cuda"
    if not (on_cuda or (machine.device.type == "cpu" and Path("/proc/self/clear_refs").exists())):
        return None
    rows, tokens = BLOCKS.get(machine.device.type, FEW_BLOCKS)
    if not fits(machine, needed := needed_for(machine, GPT2, rows, tokens)):
        return too_large(needed)
    if on_cuda:
        rows, tokens = largest(machine, GPT2), GPT2.context_length
        steps = train_steps(machine, rows, tokens, compiled=False)
    else:  # the largest pass would take minutes
        steps = timed_steps(machine)
    share, (low, high) = steps.peak_bytes / steps.needed_bytes, OF_FORMULA[machine.device.type]
    value = f"{steps.peak_bytes / 1e9:.2f} GB for {rows} x {tokens} tokens, {share:.0%} of the formula's"
    advice = "the sizes below are off by this: leave some memory free, and report it"
    figures = {"peak_bytes": steps.peak_bytes, "needed_bytes": steps.needed_bytes}
    # On a CPU, swapped memory and other allocators change what is measured.
    status = OK if low <= share <= high else WRONG if on_cuda else SLOW
    return Row(value, status, advice, f"{low:.0%} to {high:.0%}", figures)


def check_loader(machine: Machine) -> Row:
    """Batches of the training loader from a file of tokens, against what training takes."""
    rows, tokens = BLOCKS.get(machine.device.type, FEW_BLOCKS)
    file = machine.folder / "loaded.bin"
    np.random.default_rng(0).integers(GPT2.vocab_size, size=LOADED_TOKENS + 1, dtype=np.uint16).tofile(file)
    blocks = TokenDataset(file, "uint16", tokens)
    loader, _, _ = get_dataloaders(blocks, blocks, blocks, TrainingConfig(batch_size=rows, device=str(machine.device)))
    batches = iter(loader)
    next(batches)  # the workers start
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > LOADING_SECONDS:
            break
    rate = count * rows * tokens / (time.perf_counter() - began)
    value, figures = f"{shown(rate, 'tokens/s')}", {"tokens_per_second": rate}
    if not fits(machine, needed_for(machine, GPT2, rows, tokens)):
        return Row(value, figures=figures)
    share = rate / timed_steps(machine).tokens_per_second
    advice = "training waits for data: more train.num_workers, or the tokens on a faster disk (data.cache_dir)"
    return Row(
        f"{value}, {share:,.0f} x what training takes", OK if share > 1 else SLOW, advice, "more than 1 x", figures
    )


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def check_decoding(machine: Machine) -> Row:
    """Greedy decoding of one text as generate.py does it, against reading all weights once a token."""
    name = auto_without_training(InferenceConfig().precision, machine.device)
    name = "bf16" if choose_precision(name, machine.device).name == "bf16" else "fp32"
    precision = Precision(name, machine.device)
    free_memory()
    model = GPT2Model(GPT2).to(machine.device, precision.dtype).eval()
    weights = model.num_parameters() - model.position_embedding.weight.numel()
    pack_linears(model)  # whose weights are no parameters
    compiled = CompiledDecoding() if machine.device.type == "cuda" and find_compiler() else None
    generate, ids = ours(model, compiled), torch.zeros(1, PROMPT, dtype=torch.long, device=machine.device)
    generate(ids, NEW_TOKENS)  # which compiles
    seconds = min(generate(ids, NEW_TOKENS).step_seconds for _ in range(2))
    share, wanted = weights * precision.dtype.itemsize / bandwidth(machine) / seconds, OF_FLOOR
    how = f"{precision.name}{', compiled' if compiled else ''}"
    value = f"{1 / seconds:,.1f} tokens/s ({how}), {share:.0%} of what reading the weights allows"
    advice = "look for other programs (top, nvidia-smi); inference.quantization=int8 reads a quarter on a CPU"
    figures = {"tokens_per_second": 1 / seconds, "share_of_floor": share}
    return Row(value, OK if share >= wanted else SLOW, advice, f"{wanted:.0%}", figures)


# ---------------------------------------------------------------------------------------------------------------------
# What fits, and what to type


def largest(machine: Machine, model: GPT2Config, **fields: Any) -> int:
    """The largest `train.batch_size` by the formula, with the model's own dropout and whole contexts."""
    available = OF_MEMORY * memory_of(machine.device)
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
    state = OK if found["gradient_checkpointing"]["gpt2"] else MISSING
    return Row(value, state, "no size of GPT-2 can be trained here: model=gpt2_mini", figures=found)


def model_named(name: str) -> GPT2Config:
    config: Any = OmegaConf.to_object(merged(GPT2Config, compose("train", [f"model={name}"]).model))
    return config


def recommended(machine: Machine, blocks: int, ranks: int) -> list[str] | None:
    """The words that train GPT-2 124M here by the recipe, whose steps have so many blocks; None if nothing fits."""
    fitting = min(largest(machine, model_named("gpt2")), MOST_ROWS.get(machine.device.type, FEW_ROWS))
    more = [] if fitting else ["train.gradient_checkpointing=true"]
    fitting = fitting or min(largest(machine, model_named("gpt2"), gradient_checkpointing=True), FEW_ROWS)
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
    small = "python train.py experiment=quickstart takes minutes anywhere"
    if words is None:
        return Row("none: GPT-2 124M does not fit", MISSING, small)
    command, tokens = " ".join(words), recipe.train.max_steps * blocks * GPT2.context_length
    if not fits(machine, needed_for(machine, GPT2, *BLOCKS.get(machine.device.type, FEW_BLOCKS))):
        return Row("the command below; its time was not measured", figures={"command": command})
    hours = tokens / timed_steps(machine).tokens_per_second / ranks / 3600
    recipe_in_words = f"the {tokens / 1e9:.1f} billion tokens of experiment={RECIPE}"
    value = f"about {hours:,.0f} hours for {recipe_in_words}, by the command below"
    advice = f"that is for GPUs; {small}, experiment=finetune_shakespeare fine-tunes OpenAI's weights"
    figures = {"command": command, "hours": hours}
    return Row(value, OK if hours < LONG_HOURS else SLOW, advice, f"less than {LONG_HOURS:,} hours", figures)


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
