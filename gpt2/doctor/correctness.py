"""The part `Does it compute right`: train and decode a small GPT-2 on the device, and compare with fp64 on the CPU.

The reference is `transformers` with its plain attention: a reference of our own would share our mistakes. The checks
train with a `Trainer`, as train.py does.
"""

import copy
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.benchmarks.contestants import Workload
from gpt2.benchmarks.peers import in_transformers, plain_adamw
from gpt2.checkpoint.hugging_face import hf_layout, hf_name
from gpt2.config import GPT2Config, TrainingBenchmark, TrainingConfig
from gpt2.doctor.environment import find_compiler
from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Check, Machine, Row, collected_warnings
from gpt2.errors import shortened
from gpt2.generation.decode import decode
from gpt2.model import GPT2Model, MultiHeadAttention
from gpt2.ops import linear
from gpt2.ops.cpu_inference import QUANTIZED, InferenceLinear, PackedLinear, SlicedLinear, pack_linears
from gpt2.train import Trainer
from gpt2.training.optimizer import build_optimizer

BATCH_SIZE, STEPS = 2, 3
SHAPE: dict[str, Any] = {
    "vocab_size": 511,  # odd and large, so that the head is padded
    "context_length": 160,
    "d_model": 128,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 512,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
}
WEIGHT_NOISE = 0.1  # added to the initial weights, so that attention is far from uniform and no bias is zero

# The relative error of one rounding. The error of a whole model was 0.9 to 1.5 of them in 16 bits, 3 to 7 in fp32.
ROUNDING = {"fp32": 2.0**-23, "TF32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}
MAX_ROUNDINGS, MAX_ROUNDINGS_FP32 = 4, 32
MIN_ROUNDINGS = 1 / 32  # a smaller error shows that another format was used
QUANTIZATION_ERROR = {"int8": 0.05, "int4": 0.2}  # relative; 0.017 and 0.10 on a CPU without VNNI
FP32_TOLERANCE = 1e-4  # relative difference between logits with and without a cache, and between updates


# ---------------------------------------------------------------------------------------------------------------------
# Compared with fp64


class Errors(NamedTuple):
    """Relative errors. That of the gradients is the largest of all parameters."""

    logits: float
    loss: float
    gradients: float


def training(device: torch.device, **fields: Any) -> TrainingConfig:
    settings = {"batch_size": BATCH_SIZE, "num_workers": 0, "compile": False, "precision": "fp32", "log_every": 10**6}
    return TrainingConfig(device=str(device), **{**settings, **fields})


def small_workload(folder: Path, device: torch.device, **shape: Any) -> Workload:
    """Return a small model with noisy weights, and batches for `STEPS` steps."""
    workload = Workload(TrainingBenchmark(GPT2Config(**{**SHAPE, **shape}), training(device)), folder, STEPS)
    generator = torch.Generator().manual_seed(0)
    for tensor in workload.state.values():
        tensor += WEIGHT_NOISE * torch.randn(tensor.shape, generator=generator)
    return workload


@cache
def reference() -> dict[str, Tensor]:
    """Return logits, loss, and the gradient of each weight for the first batch, by `GPT2LMHeadModel` in fp64."""
    with tempfile.TemporaryDirectory() as folder:
        workload = small_workload(Path(folder), torch.device("cpu"))
    model, batch = in_transformers(workload.config.model, workload.state, "eager").double(), workload.batches[0][0]
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    weights = {name: model.get_parameter(f"transformer.{hf_name(name)}") for name in workload.state}
    gradients = {name: hf_layout(name, weight.grad) for name, weight in weights.items()}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


def first_pass(trainer: Trainer, workload: Workload) -> dict[str, Tensor]:
    """Return logits, loss and gradients as `reference` does, by the forward and backward pass of a trainer."""
    batch = {key: tensor.to(trainer.device) for key, tensor in workload.batches[0][0].items()}
    with trainer.plan.precision.autocast():
        with torch.no_grad():
            logits, _ = trainer.model(batch["input_ids"])
        _, loss = trainer.forward(**batch, return_logits=False)
    assert logits is not None and loss is not None
    trainer.scaler.scale(loss).backward()
    weights, scale = trainer.model.named_parameters(), trainer.scaler.get_scale()
    gradients = {name: in_fp64(weight.grad) / scale for name, weight in weights if weight.grad is not None}
    return {"logits": logits, "loss": loss, **gradients}


def in_fp64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference by the Euclidean norm; infinite if a number is not finite."""
    distance = float((in_fp64(found) - in_fp64(expected)).norm() / in_fp64(expected).norm())
    return distance if distance == distance else float("inf")


def errors_in(machine: Machine, precision: str, **fields: Any) -> Errors:
    """Return the errors of training in a precision, compared with fp64; `fields` are those of `TrainingConfig`."""
    workload = small_workload(machine.folder, machine.device)
    found = first_pass(workload.trainer(training(machine.device, precision=precision, **fields)), workload)
    of_each = {name: difference(found[name], expected) for name, expected in reference().items()}
    return Errors(of_each.pop("logits"), of_each.pop("loss"), max(of_each.values()))


def judged(found: Errors, name: str, advice: str) -> Row:
    """Return a row for the errors of a number format."""
    limit = ROUNDING[name] * (MAX_ROUNDINGS_FP32 if name == "fp32" else MAX_ROUNDINGS)
    expected, figures = f"at most {limit:.0e}", {**found._asdict(), "limit": limit}
    value = f"errors: logits {found.logits:.0e}, loss {found.loss:.0e}, gradients {found.gradients:.0e}; {expected}"
    if not max(found) <= limit:
        return Row(value, WRONG, advice, expected, figures)
    is_used = max(found) >= MIN_ROUNDINGS * ROUNDING[name]
    return Row(value, OK if is_used else SLOW, f"too exact: products are not computed in {name}", expected, figures)


def check_precision(machine: Machine, name: str) -> Row:
    advice = f"use another format until this is fixed: train.precision={'bf16' if name == 'fp32' else 'fp32'}"
    if name == "fp32" and machine.device.type == "cuda":
        advice += "; errors of 1e-3 are typical of TF32, which NVIDIA_TF32_OVERRIDE=1 forces"
    return judged(errors_in(machine, name), name, advice)


def check_tf32(machine: Machine) -> Row | None:
    """Check fp32 with products in TF32, which GPUs since Ampere support."""
    if machine.device.type != "cuda" or torch.cuda.get_device_capability(machine.device) < (8, 0):
        return None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return judged(errors_in(machine, "fp32"), "TF32", "TF32 is off by default: leave it off")
    finally:
        torch.set_float32_matmul_precision(before)


def check_compiled(machine: Machine) -> Row:
    """Check that a compiled model has no larger errors than its number format allows."""
    if find_compiler() is None:
        return Row("not tried: there is no C compiler", MISSING, "see the row `C compiler`")
    precision, advice = machine.precision.name, "train.compile=false trains without it"
    with collected_warnings() as warned:
        found = errors_in(machine, precision, compile=True)
    if failed := [text for text in (record.getMessage() for record in warned) if text.startswith("Not compiled")]:
        return Row(shortened(failed[0], 300), SLOW, advice)
    return judged(found, precision, advice)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, attention, optimizer


@torch.no_grad()
def decoded_logits(model: GPT2Model, text: Tensor, start: int, use_cache: bool) -> Tensor:
    """Return the logits (b, n, v) of decoding. Its tokens are those of `text` (b, start + n), whatever the logits."""
    tokens = iter(text[:, start:].T)
    steps = decode(model, text[:, :start], text.size(1) - start, lambda *_: next(tokens), use_cache=use_cache)
    return torch.stack([logits.float().cpu() for _, logits in steps], dim=1)


def cached_against_uncached(machine: Machine, kind: type[InferenceLinear]) -> float:
    """Compare logits with and without a cache in a text beyond the context; with a cache by this kind of layer."""
    workload = small_workload(machine.folder, machine.device, context_length=32)
    model = workload.trainer(workload.config.train).model.eval()
    text = torch.cat([batches[0]["input_ids"] for batches in workload.batches], dim=1).to(machine.device)  # 96 tokens
    plain = decoded_logits(model, text, 8, use_cache=False)
    pack_linears(model, kind=kind)
    return difference(decoded_logits(model, text, 8, use_cache=True), plain)


def check_decoding(machine: Machine) -> Row:
    kinds = [InferenceLinear]
    if machine.device.type == "cpu":
        kinds += [SlicedLinear, *([PackedLinear] if linear.is_available() else [])]
    found = {kind.__name__: cached_against_uncached(machine, kind) for kind in kinds}
    layouts = f", in {len(found)} layouts of the weights" if len(found) > 1 else ""
    value = f"logits differ by {max(found.values()):.0e} from those without a cache{layouts}"
    status = OK if max(found.values()) <= FP32_TOLERANCE else WRONG
    advice = "text generated on this device is wrong; try device=cpu"
    return Row(value, status, advice, f"at most {FP32_TOLERANCE:.0e}", found)


@torch.no_grad()
def quantization_error(kind: type[InferenceLinear]) -> float:
    """The relative error of a layer: of random numbers, or of ones, which give sums as large as integers can."""
    weight, x = (torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) for rows in (128, 8))
    cases = [(weight, x), (torch.ones_like(weight), torch.ones_like(x))]
    return max(difference(kind(weight)(x), F.linear(x, weight)) for weight, x in cases)


def check_quantization(machine: Machine) -> Row | None:
    if machine.device.type != "cpu":
        return None
    found = {name: quantization_error(kind) for name, kind in QUANTIZED.items() if kind.is_available()}
    if not found:
        return Row("this PyTorch has no such products for this CPU", MISSING, "leave inference.quantization=null")
    errors = [f"{name} {found[name]:.0e}" if name in found else f"no {name}" for name in QUANTIZED]
    value = f"errors of a layer: {', '.join(errors)}"
    limits = {name: QUANTIZATION_ERROR[name] for name in found}
    wrong = [name for name, error in found.items() if not error <= limits[name]]
    expected = ", ".join(f"{name} at most {limit:.0e}" for name, limit in limits.items())
    advice = f"text generated in {' and '.join(wrong)} is wrong on this CPU: leave inference.quantization=null"
    return Row(value, WRONG if wrong else OK, advice, expected, found)


BACKENDS = {  # key: the beginning of the name of the backward function
    "ScaledDotProductFlashAttentionForCpu": "flash for CPUs",
    "ScaledDotProductFlash": "flash",
    "ScaledDotProductCudnn": "cuDNN",
    "ScaledDotProductEfficient": "memory-efficient",
    "Baddbmm": "matrix products",
}


def attention_backend(device: torch.device, precision: Any, t: int, width: int = 768, num_heads: int = 12) -> str:
    """Return the kernel of attention on t tokens, found in its autograd graph; `math` if it is none of `BACKENDS`."""
    attention = MultiHeadAttention(width, num_heads, dropout=0.0, use_bias=True).to(device)
    with precision.autocast():
        mixed = attention(torch.randn(1, t, width, device=device, requires_grad=True))
    names, waiting = {}, [mixed.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in names:
            names[node] = node.name()
            waiting += [following for following, _ in node.next_functions]
    used = [title for start, title in BACKENDS.items() if any(name.startswith(start) for name in names.values())]
    return used[0] if used else "math"


def check_attention(machine: Machine) -> Row:
    t = 1024 if machine.device.type == "cuda" else 256
    backend = attention_backend(machine.device, machine.precision, t)
    good = ("flash", "cuDNN") if machine.device.type == "cuda" else ("flash for CPUs", "matrix products")
    status = OK if machine.device.type == "mps" or backend in good else SLOW
    older = " (GPUs before Ampere have no flash attention)" if backend == "memory-efficient" else ""
    advice = f"training is slower than with a fused kernel, and may hold all attention weights in memory{older}"
    value = f"{backend}, with {t} tokens in {machine.precision.name}"
    return Row(value, status, advice, " or ".join(good), {"backend": backend})


def check_optimizer(machine: Machine) -> Row:
    """Compare the updates of AdamW with fp64 on the CPU, and check that its fused kernel is used."""
    config = training(machine.device, learning_rate=1e-2)
    model = small_workload(machine.folder, machine.device).trainer(config).model
    exact_model = copy.deepcopy(model).cpu().double()
    optimizer, exact_optimizer = build_optimizer(model, config), plain_adamw(exact_model, config, foreach=False)
    before = [in_fp64(weight) for weight in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for weight, exact_weight in zip(model.parameters(), exact_model.parameters(), strict=True):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad, exact_weight.grad = gradient.to(machine.device), gradient.double()
        optimizer.step()
        exact_optimizer.step()
    weights = zip(model.parameters(), exact_model.parameters(), before, strict=True)
    error = max(difference(in_fp64(found) - old, exact - old) for found, exact, old in weights)

    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    value = f"updates differ by {error:.0e} from those in fp64; {'' if is_fused else 'not '}fused"
    expected, figures = f"at most {FP32_TOLERANCE:.0e}, fused", {"error": error, "is_fused": is_fused}
    if not error <= FP32_TOLERANCE:
        return Row(value, WRONG, "weights trained on this device are wrong: use another device", expected, figures)
    status = OK if is_fused or machine.device.type == "mps" else SLOW
    return Row(value, status, "updates take longer than with PyTorch's fused kernel", expected, figures)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of training


def tensors_of(trainer: Trainer, prefix: str | tuple[str, ...] = "") -> dict[str, Tensor]:
    """Return copies on the CPU of the tensors of a checkpoint: weights, optimizer and random states."""
    state = trainer.state_dict().items()
    tensors = {name: value for name, value in state if isinstance(value, Tensor) and name.startswith(prefix)}
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not equal bit for bit, or that only one side has."""
    unequal = {name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}
    return sorted((one.keys() ^ other.keys()) | unequal)


def check_nan(machine: Machine) -> Row:
    """Check that a step with a NaN in a gradient changes neither weights nor optimizer, and the next step trains."""
    workload = small_workload(machine.folder, machine.device)
    trainer = workload.trainer(training(machine.device, precision=machine.precision.name, on_nonfinite="skip"))
    learned = partial(tensors_of, trainer, ("model/", "optimizer/exp"))
    trainer.train_step(workload.batches[0])
    before = learned()
    hook = trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer.train_step(workload.batches[1])
    hook.remove()
    trainer.guard.poll()
    after_nan, skipped = learned(), trainer.guard.total
    trainer.train_step(workload.batches[2])
    changed, still_same = different(before, after_nan), not different(after_nan, learned())
    if changed or still_same or skipped != 1:
        reason = f"it changed {changed[0]}" if changed else "the step after it is lost" if still_same else "not noticed"
        return Row(reason, WRONG, "a NaN can ruin a run here, even with train.on_nonfinite=stop: please report it")
    return Row("left out, and the next step trains")


def check_repeated(machine: Machine, restore: bool) -> Row:
    """Train two steps twice; with `restore`, the second time from a checkpoint of the first step."""
    workload = small_workload(machine.folder, machine.device, dropout=0.1, residual_dropout=0.1)
    config = training(machine.device, precision=machine.precision.name, deterministic=True)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        trainer = workload.trainer(config)
        trainer.train_step(workload.batches[0])
        if restore:
            trainer.save_checkpoint("doctor.pth")
        trainer.train_step(workload.batches[1])
        first = tensors_of(trainer)
        trainer = workload.trainer(config)
        if restore:
            trainer.load_checkpoint(str(trainer.checkpoints.folder / "doctor.pth"))
        else:
            trainer.train_step(workload.batches[0])
        trainer.train_step(workload.batches[1])
        wrong = different(first, tensors_of(trainer))
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    if wrong:
        advice = "resumed or repeated runs give other results on this device: please report it"
        return Row(f"{len(wrong)} tensors differ, such as {wrong[0]}", WRONG, advice)
    return Row("bit for bit the same, with dropout")


CHECKS: dict[str, Check] = {
    **{name: partial(check_precision, name=name) for name in ("fp32", "bf16", "fp16")},
    "TF32": check_tf32,
    "attention": check_attention,
    "AdamW": check_optimizer,
    "cached decoding": check_decoding,
    "int8 and int4": check_quantization,
    "a NaN": check_nan,
    "a repeated step": partial(check_repeated, restore=False),
    "save and restore": partial(check_repeated, restore=True),
    "torch.compile": check_compiled,
}
