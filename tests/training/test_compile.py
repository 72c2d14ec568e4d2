"""When a model is compiled, and the fallback if compilation fails."""

import logging
from types import SimpleNamespace

import pytest
import torch

from gpt2.config import TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.ops import linear as onednn
from gpt2.runtime import device
from gpt2.runtime.device import Precision
from gpt2.training import compile as compilation
from gpt2.training.compile import Compiled, choose_plan, compile_is_worthwhile
from tests.helpers import noisy_model, random_ids, tiny_config

HOUR = 3600.0
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def problem():
    model = noisy_model(tiny_config(dropout=0.3))
    return model, {"input_ids": random_ids(model.config, 2, 8), "targets": random_ids(model.config, 2, 8, seed=2)}


def aot_eager(compile_):
    return lambda model, **options: compile_(model, backend="aot_eager", **options)


def test_compilation_is_worthwhile_in_long_cuda_runs(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(compilation, "find_spec", lambda name: object())
    precision = Precision("bf16", CUDA)
    assert compile_is_worthwhile(precision, flops=1e18, seconds=12 * HOUR)
    assert not compile_is_worthwhile(precision, flops=1e15, seconds=12 * HOUR)  # ten seconds
    assert not compile_is_worthwhile(precision, flops=1e18, seconds=60)  # time limit
    assert not compile_is_worthwhile(Precision("bf16", CPU), flops=1e18, seconds=12 * HOUR)
    assert not caplog.text
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert not compile_is_worthwhile(precision, flops=1e18, seconds=12 * HOUR)
    assert "Triton is not installed" in caplog.text


SAVED = {"device": "cpu", "precision": "fp32", "linear": "PyTorch", "compiled": True}


@pytest.mark.parametrize(
    ("options", "saved", "expected"),
    [
        ({}, None, ("fp32", "oneDNN", False)),
        ({"compile": True}, None, ("fp32", "oneDNN", True)),
        ({}, SAVED, ("fp32", "PyTorch", True)),
        ({"compile": False}, SAVED, ("fp32", "PyTorch", False)),
        ({}, {**SAVED, "device": "cuda"}, ("fp32", "oneDNN", False)),
        ({}, {**SAVED, "precision": "bf16"}, ("bf16", "PyTorch", True)),
        ({"precision": "fp32"}, {**SAVED, "precision": "bf16"}, ("fp32", "oneDNN", True)),
        ({}, {**SAVED, "linear": "of another version"}, ("fp32", "oneDNN", True)),
        ({"deterministic": True}, None, ("fp32", "PyTorch", False)),
        ({"mixed_precision": False}, {**SAVED, "precision": "bf16"}, ("fp32", "oneDNN", True)),
    ],
)
def test_plan_follows_the_configuration_then_the_checkpoint_then_the_machine(options, saved, expected, monkeypatch):
    monkeypatch.setattr(compilation, "faster_linear", lambda: "oneDNN")
    monkeypatch.setattr(device, "computes_in_bf16", lambda device: False)
    plan = choose_plan(TrainingConfig(**options), CPU, 1e18, ProcessGroup(), saved)
    assert (plan.device, plan.precision.name, plan.linear, plan.compiled) == (CPU, *expected)


def test_chunks_of_logits_grow_with_the_memory_of_a_gpu(monkeypatch):
    def chunk_bytes(gigabytes: float, saved: dict | None = None) -> int | None:
        properties = SimpleNamespace(total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        config = TrainingConfig(precision="bf16", compile=False)
        return choose_plan(config, CUDA, 1e18, ProcessGroup(), saved).chunk_bytes

    sizes = {gigabytes: chunk_bytes(gigabytes) for gigabytes in (0.5, 7.6, 23.2, 40, 79.1, 139)}
    assert [size >> 20 for size in sizes.values()] == [256, 256, 256, 512, 1024, 2048]
    machine = {"device": "cuda", "precision": "bf16", "linear": "PyTorch", "compiled": False}
    assert chunk_bytes(139, {**machine, "chunk_bytes": 3 << 20}) == 3 << 20  # the size of the resumed run
    assert chunk_bytes(23.2, {**machine, "chunk_bytes": 2 << 30}) == 256 << 20  # of a larger GPU
    assert (
        chunk_bytes(139, {**machine, "chunk_bytes": "many"})
        == chunk_bytes(139, {**machine, "device": "cpu"})
        == 2 << 30
    )


def test_batches_of_other_shapes_run_uncompiled(problem, monkeypatch):
    """Each further shape would take another minute to compile."""
    model, inputs = problem
    monkeypatch.setattr(torch, "compile", aot_eager(torch.compile))
    compiled = Compiled(model.eval(), CPU, (4, 8))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("not for this shape"))
    for t in range(1, 9):
        batch = {key: tensor[:, :t] for key, tensor in inputs.items()}
        assert compiled(**batch, return_logits=False)[1] == model(**batch, return_logits=False)[1]
    compiled.shape = (2, 8)
    compiled(**inputs, attention_mask=torch.ones(2, 8))


@pytest.mark.parametrize("compiled_before", [0, 1, 2])  # nothing, a trial, and a block
def test_failed_compilation_falls_back_with_warning(compiled_before, problem, monkeypatch, caplog):
    model, inputs = problem
    graphs = []

    def backend(graph, example_inputs):
        if len(graphs) == compiled_before:
            raise RuntimeError("\nno C++ compiler found\nand so on")
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    with caplog.at_level(logging.WARNING):
        compiled = Compiled(model.eval(), CPU, (2, 8), onednn.LINEARS["PyTorch"])
        assert compiled(**inputs, return_logits=False)[1] == model(**inputs, return_logits=False)[1]
        compiled(**inputs)
    assert [record.message for record in caplog.records] == [
        "Not compiled, training continues more slowly: " + caplog.records[0].message.partition(": ")[2]
    ]
    assert len(graphs) == compiled_before
    torch.compiler.reset()
