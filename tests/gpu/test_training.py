"""Training on a CUDA device: the host waits only to log, and results equal those of a CPU."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2.config import GPT2Config
from gpt2.errors import DivergenceError
from gpt2.evaluate import Evaluator
from gpt2.model import GPT2Model
from gpt2.runtime.device import Precision
from gpt2.train import Trainer
from gpt2.training.callbacks import Callback, Samples
from tests import fault_injection
from tests.helpers import NO_DROPOUT, random_ids
from tests.test_train import InterruptAt, assert_same_state, make_trainer, weights

PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]
FIRST_STEP = {"fp32": 5e-5, "tf32": 2e-3, "bf16": 2e-2, "fp16": 5e-3}  # relative error of loss and gradient norm


def in_precision(name: str) -> dict[str, str]:
    """The options of a precision; TF32 is a setting of the whole process."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return {"precision": "fp32" if name == "tf32" else name}


class NoHiddenWait(Callback):
    """Makes CUDA raise an error when the host waits for the device, except in steps that log."""

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.progress.step in (1, trainer.total_steps):
            torch.cuda.set_sync_debug_mode("default")

    def on_log(self, trainer: Trainer, metrics: dict) -> None:
        if trainer.progress.step == 1:
            torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("more", [{}, {"optimizer": "muon"}, {"compile": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # with fp16 the loss scale depends on each step
def test_host_waits_only_in_steps_that_log(blocks, tmp_path, cuda, precision, more):
    options = {"batch_size": 1, "accumulation_steps": 2, "max_steps": 9, "log_every": 9, "eval_every": 99}
    options |= {"precision": precision, "device": str(cuda), **more}
    trainer = make_trainer(blocks, tmp_path, 0.1, callbacks=[NoHiddenWait()], **options)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.progress.step == 9


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_trains_like_fp32_on_a_cpu(blocks, tmp_path, device, precision):
    def first_step_and_epochs(**options) -> tuple[torch.Tensor, float]:
        trainer = make_trainer(blocks, tmp_path, max_epochs=5, **options)
        first = torch.stack(trainer.train_step([blocks.__getitems__([0, 1, 2])])).cpu()
        return first, sum(trainer.train_epoch() for _ in range(4))

    expected, expected_losses = first_step_and_epochs(precision="fp32", device="cpu")
    first, losses = first_step_and_epochs(**in_precision(precision), device=str(device))
    torch.testing.assert_close(first, expected, rtol=FIRST_STEP[precision], atol=0)
    assert losses / 4 == pytest.approx(expected_losses / 4, abs=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic_run_resumes_bit_for_bit(blocks, tmp_path, device, precision):
    """With samples, dropout, accumulation and checkpointing. An operation that is not deterministic raises an error."""
    options = {"max_steps": 8, "eval_every": 2, "log_every": 1, "accumulation_steps": 2, "gradient_checkpointing": True}
    options |= {"deterministic": True, "device": str(device), **in_precision(precision)}

    def draw(trainer: list[Trainer], step: int):
        generator = torch.Generator(device).manual_seed(step)
        prompt = torch.tensor([[step, 1]], device=device)
        for token in trainer[0].model.generate(prompt, 20, 0.9, 9, 0.9, 1.2, generator=generator, min_p=0.01):
            yield str(token.tolist())

    def run(folder, *callbacks) -> Trainer:
        trainers: list[Trainer] = []
        callbacks = [*callbacks, Samples(partial(draw, trainers))]
        trainers.append(make_trainer(blocks, folder, 0.1, callbacks=callbacks, **options))
        return trainers[0]

    run(tmp_path / "whole").train()
    first = run(tmp_path / "parts", InterruptAt(3))
    first.train()
    assert first.progress.step == 3
    second = run(tmp_path / "parts")
    second.load_checkpoint(str(tmp_path / "parts" / "last.pth"))
    second.train()
    assert_same_state(tmp_path / "whole" / "last.pth", tmp_path / "parts" / "last.pth")
    assert_same_state(tmp_path / "whole" / "best_model.pth", tmp_path / "parts" / "best_model.pth")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nonfinite_steps_are_skipped_by_the_device_as_by_the_host(blocks, tmp_path, device, precision, monkeypatch):
    monkeypatch.setenv(fault_injection.VARIABLE, "nan_loss@2,inf_gradient@4,nan_gradient@5-6")
    trainers = []
    for name, ahead in (("device", device.type == "cuda"), ("host", False)):
        options = {"device": str(device), "precision": precision, "max_steps": 9, "deterministic": True}
        trainer = make_trainer(blocks, tmp_path / name, on_nonfinite="skip", nonfinite_limit=3, **options)
        assert trainer.guard.host_runs_ahead == (device.type == "cuda" and precision != "fp16")
        trainer.guard.host_runs_ahead &= ahead
        trainer.train()
        trainers.append(trainer)
    one, other = trainers
    assert one.guard.total == other.guard.total == 4
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())
    if precision == "fp16":
        assert one.scaler.get_scale() < 65536.0


@pytest.mark.parametrize("kind", ["nan_loss", "inf_gradient"])
def test_nonfinite_step_stops_the_run_and_keeps_its_checkpoints(blocks, tmp_path, device, kind, monkeypatch):
    monkeypatch.setenv(fault_injection.VARIABLE, f"{kind}@7")
    trainer = make_trainer(blocks, tmp_path, device=str(device), max_steps=9, save_every=1, keep_checkpoints=9)
    with pytest.raises(DivergenceError, match=r"^step 7 \(batch 2 of epoch 2\): the (loss|gradient of)"):
        trainer.train()
    assert len(list(tmp_path.glob("step_*"))) == 6


def test_accumulation_and_checkpointing_change_no_result(blocks, tmp_path, device):
    options = {"device": str(device), "max_epochs": 2, "epsilon": 1e-2}  # no full steps from rounding errors
    whole = make_trainer(blocks, tmp_path, batch_size=4, **options)
    parts = make_trainer(blocks, tmp_path, batch_size=2, accumulation_steps=2, gradient_checkpointing=True, **options)
    for trainer in (whole, parts):
        trainer.train_epoch()
        trainer.train_epoch()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=1e-5)


def test_evaluation_gives_the_loss_of_a_cpu(blocks, tmp_path, device):
    trainer = make_trainer(blocks, tmp_path, max_steps=4, device="cpu")
    trainer.train()
    results = [Evaluator(trainer.model, trainer.val_loader, str(place), "fp32").evaluate() for place in ("cpu", device)]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
    assert results[1]["tokens"] == results[0]["tokens"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_uses_the_flash_kernel_of_attention(device, checkpointing):
    """The kernel raises an error if it does not support these tensors."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("older GPUs have no such kernel")
    config = GPT2Config(257, 256, 128, 2, 2, 256, **{**NO_DROPOUT, "attention_dropout": 0.1 * (device.type == "cuda")})
    model = GPT2Model(config).to(device).train()
    model.gradient_checkpointing = checkpointing
    ids = random_ids(config, 2, 256).to(device)
    precision = Precision("bf16" if device.type == "cuda" else "fp32", device)  # a CPU multiplies matrices in bf16
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with precision.autocast():
            _, loss = model(ids, targets=ids, return_logits=False)
        loss.backward()
    assert model.blocks[0].attention.qkv.weight.grad.isfinite().all()
