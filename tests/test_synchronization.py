"""The host does not wait for the device: it reads no number back and makes no blocking copy.

On the device `meta`, tensors have shapes but no numbers, so every operation that reads a number raises an error:
`.item()`, `.cpu()`, `bool()`, indexing by a mask. Most code is the same there as on CUDA. If PyTorch is built for CUDA,
its fake CUDA tensors test the rest up to the backward pass, without a GPU. tests/gpu has the same tests for a GPU.
"""

from contextlib import nullcontext
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tests.test_train as training
from gpt2 import train
from gpt2.generation.decode import CompiledDecoding, decode
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.model import GPT2Model, meta_model
from gpt2.runtime.device import Precision
from gpt2.training import nonfinite
from tests.helpers import tiny_config, without_numbers
from tests.test_train import make_trainer

FILTERED = SamplingParams(temperature=0.8, repetition_penalty=1.2, top_k=20, top_p=0.9, min_p=0.01)
META, CUDA = torch.device("meta"), torch.device("cuda")
blocks = training.blocks  # the fixture
built_for_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that is built for CUDA")


class NoBlockingCopy(TorchDispatchMode):
    """Raises an error if the host waits for a copy between itself and a device.

    A Python number that is passed to a kernel is not a copy.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, result))
        kinds = {tensor.device.type for tensor in given if tensor.dim() or tensor.device.type != "cpu"}
        kinds |= {tensor.device.type for tensor in made}
        is_asynchronous = any(value is True for value in (*args, kwargs.get("non_blocking")))
        assert len(kinds) < 2 or is_asynchronous, f"the host waits for {func}"
        return result


@pytest.fixture(params=["meta", pytest.param("cuda", marks=built_for_cuda)])
def device(request):
    """A device whose numbers cannot be read."""
    with FakeTensorMode() if request.param == "cuda" else nullcontext():
        yield torch.device(request.param)


def model_on(device: torch.device) -> GPT2Model:
    return without_numbers(meta_model(tiny_config(dropout=0.1)), device.type)


@pytest.fixture
def trainer_of(blocks, tmp_path, monkeypatch):
    """A Trainer on `meta`, whose host runs ahead as on CUDA."""
    monkeypatch.setattr(train, "choose_device", lambda *_: META)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # `meta` has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(nonfinite, "_copy_to_host", lambda tensor: (torch.zeros(tensor.shape), None))

    def drop_found_inf(optimizer: torch.optim.Optimizer, *_) -> None:  # only fused kernels accept it
        vars(optimizer).pop("found_inf", None)

    def make(**options) -> train.Trainer:
        trainer = make_trainer(blocks, tmp_path, 0.1, **options)
        trainer.guard.host_runs_ahead = True
        trainer.optimizer.register_step_pre_hook(drop_found_inf)
        trainer.model.train()
        return trainer

    return make


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"gradient_checkpointing": True}], ids=str)
def test_training_step(blocks, trainer_of, options):
    trainer = trainer_of(accumulation_steps=2, **options)
    for _ in range(3):
        loss, norm = trainer.train_step([blocks.__getitems__([0, 1]), blocks.__getitems__([2])])
        trainer.losses_since_log.add(loss)
    assert loss.device == norm.device == META
    with pytest.raises(RuntimeError):
        trainer.losses_since_log.compute()


@built_for_cuda
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "gradient_checkpointing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_forward_pass_of_training(monkeypatch, precision, recomputed):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(), NoBlockingCopy():
        model = model_on(CUDA)
        model.gradient_checkpointing = recomputed
        batch = torch.empty(3, 16, dtype=torch.long).to(CUDA, non_blocking=True)
        divisor = torch.full((), 48.0, device=CUDA)
        with Precision(precision, CUDA).autocast():
            _, loss = model(batch, targets=batch, divisor=divisor, return_logits=False)
        assert (loss.device.type, loss.requires_grad, loss.dtype) == ("cuda", True, torch.float32)


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic cache", "static cache"])
def test_decoding_and_sampling(device, is_static, monkeypatch):
    """No copy blocks between two moves of the window, and even a move, which needs the host, reads no number back."""
    sampler = partial(next_token, params=FILTERED)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # it makes its own fake tensors
    compiled = CompiledDecoding() if is_static else None
    text = torch.empty(2, 3, dtype=torch.long, device=device)
    steps = decode(model_on(device), text, 20, sampler, compiled=compiled)
    next(steps)
    with NoBlockingCopy():
        assert len(list(islice(steps, 12))) == 12
    assert [(tokens.device.type, tokens.shape) for tokens, _ in steps] == [(device.type, (2,))] * 7


def test_losses_of_an_evaluation(device, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # `meta` has no autocast
    model = model_on(device).eval()
    batch, places = (torch.empty(shape, dtype=torch.long, device=device) for shape in ((3, 16), (5,)))
    with NoBlockingCopy():
        losses = [model.token_losses(batch, batch), *model.score_tokens(batch, places, places)]
    assert {tensor.device.type for tensor in losses} == {device.type}
