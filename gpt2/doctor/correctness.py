"""Does it compute right: training and decoding of a small GPT-2 on the device, against fp64 on the CPU.

The reference is `transformers`, in fp64 and with its plain attention: with our own code a wrong function would be
compared with itself. What is examined is the path that a training takes: a `Trainer` with its plan.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.benchmarks.contestants import Workload
from gpt2.checkpoint.hugging_face import hf_layout, hf_name, write_folder
from gpt2.config import GPT2Config, TrainingBenchmark, TrainingConfig
from gpt2.doctor.environment import find_compiler
from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Check, Machine, Row, messages
from gpt2.errors import shortened
from gpt2.generation.decode import decode
from gpt2.model import GPT2Model, MultiHeadAttention
from gpt2.ops import linear
from gpt2.ops.cpu_inference import InferenceLinear, PackedLinear, SlicedLinear, pack_linears
from gpt2.train import Trainer
from gpt2.training.optimizer import build_optimizer

ROWS, STEPS = 2, 3
SHAPE: dict[str, Any] = {
    "vocab_size": 511,  # odd and large enough, so that the head is padded
    "context_length": 160,
    "d_model": 128,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 512,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
}
NOISE = 0.1  # added to the initial weights, so that attention is far from uniform and no bias is zero

# The relative error of one operation. Of a whole model it was 0.9 to 1.5 of it in 16 bits and 3 to 7 in fp32.
ROUNDING = {"fp32": 2.0**-23, "TF32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}
MOST, MOST_FP32 = 4, 32  # of these errors
LEAST = 1 / 32  # a smaller error shows that the products were made in another format
NEARLY_EQUAL = 1e-4  # logits of two ways in fp32


# ---------------------------------------------------------------------------------------------------------------------
# Against fp64


@dataclass(frozen=True)
class Outcome:
    """Of one pass over one batch, in fp64 on the CPU."""

    logits: Tensor  # (b, t, v)
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative errors; of the gradients that of the worst parameter."""

    logits: float
    loss: float
    gradients: float

    @property
    def worst(self) -> float:
        return max(asdict(self).values())


@contextmanager
def small_workload(device: torch.device, **shape: Any) -> Iterator[Workload]:
    """A small model with noisy weights, and batches for some steps, in a temporary folder."""
    config = TrainingBenchmark(GPT2Config(**{**SHAPE, **shape}), training(device))
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(config, Path(folder), STEPS)
        generator = torch.Generator().manual_seed(0)
        workload.state = {
            name: tensor + NOISE * torch.randn(tensor.shape, generator=generator)
            for name, tensor in workload.state.items()
        }
        yield workload


def training(device: torch.device, **fields: Any) -> TrainingConfig:
    settings = {"batch_size": ROWS, "num_workers": 0, "compile": False, "precision": "fp32", "log_every": 10**6}
    return TrainingConfig(device=str(device), **{**settings, **fields})


@cache
def reference() -> Outcome:
    """The outcome of the first batch by `GPT2LMHeadModel` in fp64."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with small_workload(torch.device("cpu")) as workload:
        write_folder(workload.folder, workload.config.model, workload.state, None, card="")
        loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(workload.folder, attn_implementation="eager")
        twin, batch = loaded.double(), workload.batches[0][0]
    logits = twin(input_ids=batch["input_ids"], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    theirs = dict(twin.named_parameters())
    gradients = {name: hf_layout(name, theirs[f"transformer.{hf_name(name)}"].grad) for name in workload.state}
    return Outcome(logits.detach(), loss.item(), gradients)


def outcome(trainer: Trainer, workload: Workload) -> Outcome:
    """The same by a trainer, as it makes its passes."""
    batch = {key: tensor.to(trainer.device) for key, tensor in workload.batches[0][0].items()}
    with trainer.plan.precision.autocast():
        with torch.no_grad():
            logits, _ = trainer.model(batch["input_ids"])
        _, loss = trainer.forward(**batch, return_logits=False)
    assert logits is not None and loss is not None
    trainer.scaler.scale(loss).backward()
    scale = trainer.scaler.get_scale()
    gradients = {name: in_fp64(p.grad) / scale for name, p in trainer.model.named_parameters() if p.grad is not None}
    return Outcome(in_fp64(logits), loss.item(), gradients)


def in_fp64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def errors(found: Outcome, wanted: Outcome) -> Errors:
    of_gradients = [difference(found.gradients[name], gradient) for name, gradient in wanted.gradients.items()]
    of_loss = abs(found.loss - wanted.loss) / abs(wanted.loss)
    return Errors(difference(found.logits, wanted.logits), of_loss, max(of_gradients))


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative, by the Euclidean norm; infinite where a number is not finite."""
    distance = float((in_fp64(found) - in_fp64(wanted)).norm() / in_fp64(wanted).norm())
    return distance if distance == distance else float("inf")


def errors_in(device: torch.device, precision: str, **fields: Any) -> Errors:
    """Errors of a training in a precision, against fp64; `fields` are of `TrainingConfig`."""
    with small_workload(device) as workload:
        trainer = workload.trainer(training(device, precision=precision, **fields))
        return errors(outcome(trainer, workload), reference())


def judged(found: Errors, name: str, advice: str) -> Row:
    """A row for the errors of a number format."""
    most = ROUNDING[name] * (MOST_FP32 if name == "fp32" else MOST)
    value = f"errors: logits {found.logits:.0e}, loss {found.loss:.0e}, gradients {found.gradients:.0e}"
    value, expected, figures = f"{value}; at most {most:.0e}", f"at most {most:.0e}", {**asdict(found), "limit": most}
    if not found.worst <= most:
        return Row(value, WRONG, advice, expected, figures)
    is_used = found.worst >= LEAST * ROUNDING[name]
    return Row(value, OK if is_used else SLOW, f"too exact: products are not made in {name}", expected, figures)


def check_precision(machine: Machine, name: str) -> Row:
    advice = f"train in another format until this is settled: train.precision={'bf16' if name == 'fp32' else 'fp32'}"
    if name == "fp32" and machine.device.type == "cuda":
        advice += "; errors of 1e-3 are those of TF32, which NVIDIA_TF32_OVERRIDE=1 forces"
    return judged(errors_in(machine.device, name), name, advice)


def check_tf32(machine: Machine) -> Row | None:
    """fp32 with products in TF32, which GPUs have since Ampere."""
    if machine.device.type != "cuda" or torch.cuda.get_device_capability(machine.device) < (8, 0):
        return None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return judged(errors_in(machine.device, "fp32"), "TF32", "nothing uses TF32 unless you switch it on: do not")
    finally:
        torch.set_float32_matmul_precision(before)


def check_compiled(machine: Machine) -> Row:
    """`torch.compile` has the errors of its number format, as the uncompiled model has."""
    if find_compiler() is None:
        return Row("not tried: there is no C compiler", MISSING, "see the row of the compiler")
    precision, advice = machine.precision.name, "train.compile=false trains without it"  # as a run does that fails
    with messages() as warned:
        found = errors_in(machine.device, precision, compile=True)
    if failed := [text for text in warned if text.startswith("Not compiled")]:
        return Row(shortened(failed[0], 300), SLOW, advice)
    return judged(found, precision, advice)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, attention, optimizer


@torch.no_grad()
def decoded_logits(model: GPT2Model, text: Tensor, start: int, use_cache: bool) -> Tensor:
    """The logits (b, n, v) of decoding that is made to continue `text` (b, start + n): rounding decides no token."""
    tokens = iter(text[:, start:].T)
    steps = decode(model, text[:, :start], text.size(1) - start, lambda *_: next(tokens), use_cache=use_cache)
    return torch.stack([logits.float().cpu() for _, logits in steps], dim=1)


def cached_against_uncached(device: torch.device, kind: type[InferenceLinear] | None = None) -> float:
    """The largest difference in a text that is longer than the context; with a layout of weights for CPUs."""
    with small_workload(device, context_length=32) as workload:
        model = workload.trainer(workload.config.train).model.eval()
        text = torch.cat([batches[0]["input_ids"] for batches in workload.batches], dim=1).to(device)  # of 96 tokens
    plain = decoded_logits(model, text, 8, use_cache=False)
    if kind is not None:
        pack_linears(model, kind=kind)
    return difference(decoded_logits(model, text, 8, use_cache=True), plain)


def check_decoding(machine: Machine) -> Row:
    has_packed = machine.device.type == "cpu" and linear.is_available()
    kinds = [None, *([SlicedLinear] if machine.device.type == "cpu" else []), *([PackedLinear] if has_packed else [])]
    found = {kind.__name__ if kind else "plain": cached_against_uncached(machine.device, kind) for kind in kinds}
    layouts = f", in {len(found)} layouts of the weights" if len(found) > 1 else ""
    is_right = max(found.values()) <= NEARLY_EQUAL
    value = f"logits differ by {max(found.values()):.0e} from those without a cache{layouts}"
    advice = "generated text is wrong on this device; device=cpu may be right"
    return Row(value, OK if is_right else WRONG, advice, f"at most {NEARLY_EQUAL:.0e}", found)


BACKENDS = {  # by the start of the name of their backward functions
    "ScaledDotProductFlashAttentionForCpu": "flash for CPUs",
    "ScaledDotProductFlash": "flash",
    "ScaledDotProductCudnn": "cuDNN",
    "ScaledDotProductEfficient": "memory-efficient",
    "Baddbmm": "matrix products",
}


def attention_backend(device: torch.device, precision: Any, t: int, width: int = 768, num_heads: int = 12) -> str:
    """What the attention of a training on texts of t tokens really calls; `math` for what is none of `BACKENDS`."""
    attention = MultiHeadAttention(width, num_heads, dropout=0.0, use_bias=True).to(device)
    with precision.autocast():
        mixed = attention(torch.randn(1, t, width, device=device, requires_grad=True))
    names, waiting, seen = set(), [mixed.grad_fn], set()
    while waiting:  # the graph of the backward pass
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return next((title for start, title in BACKENDS.items() if any(n.startswith(start) for n in names)), "math")


def check_attention(machine: Machine) -> Row:
    t = 1024 if machine.device.type == "cuda" else 256
    backend = attention_backend(machine.device, machine.precision, t)
    good = ("flash", "cuDNN") if machine.device.type == "cuda" else ("flash for CPUs", "matrix products")
    value = f"{backend}, with {t} tokens in {machine.precision.name}"
    if machine.device.type == "mps" or backend in good:
        return Row(value, expected=" or ".join(good), figures={"backend": backend})
    older = " (GPUs before Ampere have no flash attention)" if backend == "memory-efficient" else ""
    advice = f"all attention weights may be in memory, and training is slower than it could be{older}"
    return Row(value, SLOW, advice, " or ".join(good), {"backend": backend})


def optimizer_error(device: torch.device) -> tuple[float, bool]:
    """The relative error of AdamW's updates against fp64 on the CPU, and whether its fused kernel is used."""
    config = training(device, learning_rate=1e-2)
    with small_workload(device) as workload:
        model = workload.trainer(config).model
    ours = build_optimizer(model, config)
    before = {name: in_fp64(parameter) for name, parameter in model.named_parameters()}
    plain = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    decays = {True: config.weight_decay, False: 0.0}
    groups = [{"params": [p for p in plain.values() if (p.dim() > 1) == k], "weight_decay": decays[k]} for k in decays]
    betas = (config.beta1, config.beta2)
    theirs = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad, plain[name].grad = gradient.to(device), gradient.double()
        ours.step()
        theirs.step()
    of_each = [difference(p - before[name].to(p), plain[name] - before[name]) for name, p in updated(model).items()]
    return max(of_each), all(group.get("fused") for group in ours.param_groups)


def updated(model: GPT2Model) -> dict[str, Tensor]:
    return {name: in_fp64(parameter) for name, parameter in model.named_parameters()}


def check_optimizer(machine: Machine) -> Row:
    error, is_fused = optimizer_error(machine.device)
    value = f"updates differ by {error:.0e} from those in fp64; {'' if is_fused else 'not '}fused"
    expected, figures = f"at most {NEARLY_EQUAL:.0e}, fused", {"error": error, "is_fused": is_fused}
    if not error <= NEARLY_EQUAL:
        return Row(value, WRONG, "weights that are trained here are wrong: train on another device", expected, figures)
    state = OK if is_fused or machine.device.type == "mps" else SLOW
    return Row(value, state, "its steps take longer than those of PyTorch's fused kernel", expected, figures)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of training


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors that a checkpoint of the training would hold: weights, optimizer and random states."""
    return {name: value.clone() for name, value in trainer.state_dict().items() if isinstance(value, Tensor)}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not equal bit for bit."""
    return sorted(name for name in one.keys() | other.keys() if not equal(one.get(name), other.get(name)))


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.cpu(), other.cpu())


def check_nan(machine: Machine) -> Row:
    """A step with a NaN in one gradient leaves weights and optimizer as they are, and the next one trains."""
    with small_workload(machine.device) as workload:
        config = training(machine.device, precision=machine.precision.name, on_nonfinite="skip")
        trainer = workload.trainer(config)
        trainer.train_step(workload.batches[0])
        before = learned(trainer)
        hook = trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * float("nan"))
        trainer.train_step(workload.batches[1])
        hook.remove()
        trainer.guard.poll()
        after_nan, counted = learned(trainer), trainer.guard.total
        trainer.train_step(workload.batches[2])
        changed, still_same = different(before, after_nan), not different(after_nan, learned(trainer))
    if changed or still_same or counted != 1:
        reason = f"it changed {changed[0]}" if changed else "the step after it is lost" if still_same else "not noticed"
        return Row(reason, WRONG, "a single NaN can spoil a run here: train.on_nonfinite=stop does not help; report it")
    return Row("left out, and the next step trains")


def learned(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in weights_of(trainer).items() if name.startswith(("model/", "optimizer/exp"))}


@contextmanager
def deterministic_restored() -> Iterator[None]:
    """Undo what `train.deterministic` sets for the whole process."""
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def repeated_steps(machine: Machine, restore: bool) -> list[str]:
    """Train twice; the second time after the first step from its checkpoint, if wanted. Returns what differs."""
    with deterministic_restored(), small_workload(machine.device, dropout=0.1, residual_dropout=0.1) as workload:
        config = training(machine.device, precision=machine.precision.name, deterministic=True)
        first, second = workload.trainer(config), None
        first.train_step(workload.batches[0])
        if restore:
            first.save_checkpoint("doctor.pth")
        first.train_step(workload.batches[1])
        states = weights_of(first)
        second = workload.trainer(config)
        if restore:
            second.load_checkpoint(str(workload.folder / "checkpoints" / "doctor.pth"))
        else:
            second.train_step(workload.batches[0])
        second.train_step(workload.batches[1])
        return different(states, weights_of(second))


def check_repeated(machine: Machine, restore: bool) -> Row:
    wrong = repeated_steps(machine, restore)
    if wrong:
        advice = "a resumed run may not be the run it would have been; please report it"
        return Row(f"{len(wrong)} tensors differ, such as {wrong[0]}", WRONG, advice)
    return Row("bit for bit the same, with dropout")


CHECKS: dict[str, Check] = {
    **{name: partial(check_precision, name=name) for name in ("fp32", "bf16", "fp16")},
    "TF32": check_tf32,
    "attention": check_attention,
    "AdamW": check_optimizer,
    "cached decoding": check_decoding,
    "a NaN": check_nan,
    "a repeated step": partial(check_repeated, restore=False),
    "save and restore": partial(check_repeated, restore=True),
    "torch.compile": check_compiled,
}
