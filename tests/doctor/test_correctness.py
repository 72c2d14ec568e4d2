"""The checks find nothing wrong on this machine, and find faults that the tests inject."""

import pytest
import torch

import gpt2.model
from gpt2.doctor import correctness
from gpt2.doctor.correctness import CHECKS, Errors, attention_backend, difference, errors_in, judged
from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Machine, Row, run_checks
from gpt2.generation.kv_cache import LayerKVCache
from gpt2.ops.cpu_inference import QUANTIZED
from gpt2.runtime.device import Precision
from gpt2.training import optimizer
from gpt2.training.nonfinite import NonFiniteGuard

CPU = torch.device("cpu")


def found(tmp_path, name: str) -> Row:
    (row,) = run_checks(Machine(CPU, tmp_path), {"part": {name: CHECKS[name]}})
    assert row.status == OK or row.advice
    return row


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("torch.compile", "TF32")])
def test_nothing_is_wrong_here(tmp_path, name):
    assert found(tmp_path, name).status == OK


def test_compilation_without_a_compiler_and_one_that_fails(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no backend")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: broken)
    row = found(tmp_path, "torch.compile")
    assert row.status == SLOW  # runs continue without it
    assert "no backend" in row.value
    monkeypatch.setattr(correctness, "find_compiler", lambda: None)
    assert found(tmp_path, "torch.compile").status == MISSING


def test_wrong_attention(tmp_path, monkeypatch):
    real = gpt2.model.attend
    monkeypatch.setattr(gpt2.model, "attend", lambda qkv, *rest: real(1.01 * qkv, *rest))
    row = found(tmp_path, "fp32")
    assert row.status == WRONG
    assert row.figures["logits"] > row.figures["limit"]


def test_wrong_gradient(tmp_path, monkeypatch):
    real = gpt2.model.chunked_linear_cross_entropy

    def wrong(*arguments):
        loss = real(*arguments)
        return loss + 1e-4 * (loss - loss.detach())  # the same loss, and a gradient that is 1e-4 too long

    monkeypatch.setattr(gpt2.model, "chunked_linear_cross_entropy", wrong)
    assert found(tmp_path, "fp32").status == WRONG


def test_wrong_optimizer(tmp_path, monkeypatch):
    def wrong(model, config):
        built = optimizer.build_adamw(model, config)
        built.param_groups[0]["lr"] *= 1.01
        return built

    monkeypatch.setitem(optimizer.BUILDERS, "adamw", wrong)
    assert found(tmp_path, "AdamW").status == WRONG


def test_slow_optimizer(tmp_path, monkeypatch):
    def plain(model, config):
        built = optimizer.build_adamw(model, config)
        for group in built.param_groups:
            group["fused"] = False
        return built

    monkeypatch.setitem(optimizer.BUILDERS, "adamw", plain)
    assert found(tmp_path, "AdamW").status == SLOW


def test_step_with_nan_that_changes_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(NonFiniteGuard, "check", lambda *_: True)
    row = found(tmp_path, "a NaN")
    assert (row.status, row.value.split()[:2]) == (WRONG, ["it", "changed"])


def test_finite_step_that_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(NonFiniteGuard, "check", lambda *_: False)
    assert found(tmp_path, "a NaN").value == "the step after it is lost"


def test_wrong_cache(tmp_path, monkeypatch):
    real = LayerKVCache.append
    monkeypatch.setattr(LayerKVCache, "append", lambda self, kv, **rest: real(self, 1.01 * kv, **rest))
    assert found(tmp_path, "cached decoding").status == WRONG


@pytest.mark.parametrize("kind", QUANTIZED.values())
def test_wrong_quantized_products(tmp_path, kind, monkeypatch):
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: real(self, x).clamp(max=100))  # as if a sum overflowed
    row = found(tmp_path, "int8 and int4")
    assert row.status == WRONG
    assert f"text generated in {next(name for name in QUANTIZED if QUANTIZED[name] is kind)} is wrong" in row.advice


def test_pytorch_without_quantized_products(tmp_path, monkeypatch):
    monkeypatch.setattr(QUANTIZED["int8"], "is_available", lambda: False)
    row = found(tmp_path, "int8 and int4")
    assert (row.status, row.value[:27]) == (OK, "errors of a layer: no int8,")
    monkeypatch.setattr(QUANTIZED["int4"], "is_available", lambda: False)
    assert found(tmp_path, "int8 and int4").status == MISSING


def test_step_that_is_not_repeatable(tmp_path, monkeypatch):
    real = optimizer.learning_rate
    count = iter(range(1, 100))
    monkeypatch.setattr("gpt2.train.learning_rate", lambda *rest: real(*rest) * (1 + 1e-3 * next(count)))
    row = found(tmp_path, "a repeated step")
    assert row.status == WRONG
    assert "tensors differ, such as model/" in row.value
    assert not torch.are_deterministic_algorithms_enabled()


def test_state_that_is_not_restored(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2.train.load_optimizer_tensors", lambda *_: None)
    assert found(tmp_path, "save and restore").status == WRONG


def test_errors_in_a_format_are_judged_by_its_rounding():
    assert judged(Errors(4e-6, 0.0, 1e-6), "fp32", "a").status == WRONG
    assert judged(Errors(3e-6, 0.0, 1e-6), "fp32", "a").status == OK
    assert judged(Errors(1e-3, 0.0, 1e-2), "bf16", "a").status == OK
    assert judged(Errors(1e-3, 0.0, 1e-5), "TF32", "a").status == OK
    assert judged(Errors(1e-6, 0.0, 1e-5), "TF32", "a").status == SLOW  # fp32 was used instead
    assert judged(Errors(float("inf"), 0.0, 0.0), "bf16", "a").status == WRONG
    assert difference(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


@pytest.mark.parametrize(
    ("precision", "t", "backend"),
    [("fp32", 64, "matrix products"), ("fp32", 256, "flash for CPUs"), ("bf16", 256, "matrix products")],
)
def test_backend_of_attention(precision, t, backend):
    assert attention_backend(CPU, Precision(precision, CPU), t, width=32, num_heads=2) == backend


def test_plain_attention_is_detected(monkeypatch):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_backend(CPU, Precision("fp32", CPU), 256, width=32, num_heads=2) == "math"


def test_errors_of_each_implementation_of_products(tmp_path, monkeypatch):
    for name in correctness.linear.LINEARS:
        monkeypatch.setattr("gpt2.training.compile.faster_linear", lambda name=name: name)
        assert max(errors_in(Machine(CPU, tmp_path), "fp32")) < 4e-6
