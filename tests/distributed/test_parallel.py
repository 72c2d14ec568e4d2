"""Strategies with compiled blocks, in a group of one process."""

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from gpt2.distributed.parallel import DataParallel, FullySharded
from gpt2.distributed.process_group import ProcessGroup
from gpt2.runtime.device import Precision
from gpt2.training.compile import Compiled
from tests.helpers import noisy_model, random_ids, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ProcessGroup()
    dist.destroy_process_group()


@pytest.fixture
def events(monkeypatch):
    """The graphs that are compiled, and the backward passes of compiled graphs, in order."""
    events: list[str] = []

    def forward(graph, inputs):
        events.append("compiled")
        return make_boxed_func(graph.forward)

    def backward(graph, inputs):
        @make_boxed_func
        def run(*arguments):
            events.append("backward")
            return graph.forward(*arguments)

        return run

    compile_, backend = torch.compile, aot_autograd(fw_compiler=forward, bw_compiler=backward)
    monkeypatch.setattr(torch, "compile", lambda part, **options: compile_(part, backend=backend, **options))
    yield events
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("strategy", "gradient_checkpointing"), [(DataParallel, False), (DataParallel, True), (FullySharded, False)]
)
def test_a_block_is_compiled_once_and_its_gradients_are_ready_before_the_next_backward_pass(
    strategy, gradient_checkpointing, group, events
):
    model = noisy_model(tiny_config(num_layers=3))
    model.gradient_checkpointing = gradient_checkpointing
    inputs = {"input_ids": random_ids(model.config, 2, 8), "targets": random_ids(model.config, 2, 8, seed=2)}
    _, expected = model(**inputs, return_logits=False)
    gradients = torch.autograd.grad(expected, tuple(model.parameters()))

    parallel = strategy(model, Precision("fp32", CPU), group)
    forward = parallel.forward(Compiled(model, CPU, (2, 8)))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    for step in range(2):
        events.clear()
        model.zero_grad()
        with parallel.pass_context(is_last=True):
            _, loss = forward(**inputs, return_logits=False)
            torch.testing.assert_close(loss, expected)
            loss.backward()
        assert events.count("compiled") == (0 if step else 2)  # a block and the loss
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            whole = parameter.grad.full_tensor() if strategy is FullySharded else parameter.grad
            torch.testing.assert_close(whole, gradient)
        if strategy is not FullySharded:  # FSDP has its own hooks
            passes = [events[: events.index(f"blocks.{n}.attention.qkv.weight")].count("backward") for n in (2, 1, 0)]
            assert passes == [2, 3, 4]  # the first is that of the loss
