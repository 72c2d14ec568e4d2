"""Muon in batches equals Muon on each matrix alone, and skips a step where `found_inf` is 1."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.config import GPT2Config, TrainingConfig
from gpt2.model import GPT2Model, meta_model
from gpt2.runtime.device import Precision
from gpt2.training import muon
from gpt2.training.muon import Muon, orthogonal
from gpt2.training.optimizer import build_optimizer, use_precision
from tests.helpers import tiny_config

CONFIG = TrainingConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1, muon_momentum=0.9)
SHAPES = [(48, 16, 3), (16, 16, 1), (64, 16, 1), (16, 64, 1), (10, 6, 2)]  # rows, columns, matrices in them


def give_gradients(weights: list[torch.nn.Parameter], seed: int, value: float | None = None) -> None:
    """Give the weights random gradients of very different sizes; `value` becomes an element of the last."""
    random = torch.Generator().manual_seed(seed)
    for number, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=random) * 10.0 ** (number % 5 - 2)
    if value is not None:
        weights[-1].grad.view(-1)[-1] = value


@pytest.mark.parametrize("batch", [1, 3, 100])  # weights
@pytest.mark.parametrize(("rows", "columns", "stacked"), SHAPES)
def test_batches_equal_matrices_one_by_one(rows, columns, stacked, batch, monkeypatch):
    """torch.optim.Muon gets each stacked matrix as a separate parameter."""
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", batch * rows * columns)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(rows, columns)) for _ in range(7)]
    parts = [torch.nn.Parameter(part.clone()) for weight in weights for part in weight.detach().chunk(stacked)]
    shape = tuple(sorted((rows // stacked, columns)))
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    ours = Muon([{"params": weights, "shape": shape}], **options)
    ours.dtype = torch.bfloat16  # as in theirs
    theirs = torch.optim.Muon(parts, **options, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients(weights, step)
        for part, gradient in zip(parts, [g for w in weights for g in w.grad.chunk(stacked)], strict=True):
            part.grad = gradient.clone()
        before = torch.stack([weight.detach().clone() for weight in weights])
        ours.step()
        theirs.step()
        alone = torch.cat([part.detach() for part in parts]).view_as(before)
        torch.testing.assert_close(torch.stack(weights).detach(), alone, rtol=0, atol=1e-4)  # updates of bf16, 2e-3
        assert (alone - before).abs().max() > 1e-3


def test_q_k_and_v_are_orthogonal_each():
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(d_model=32, num_heads=2, d_ff=64))
    assert model.matrices() == {
        f"blocks.{layer}.{name}.weight": 3 if name == "attention.qkv" else 1
        for layer in range(model.config.num_layers)
        for name in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    }
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon", learning_rate=1.0, weight_decay=0.0))
    weight = model.blocks[0].attention.qkv.weight
    before = weight.detach().clone()
    give_gradients(list(model.parameters()), 0)
    weight.grad[32:64] *= 1e4  # the gradient of k does not make the updates of q and v small
    optimizer.step()
    for part in (before - weight.detach()).chunk(3):
        values = torch.linalg.svdvals(part) / (0.2 * 32**0.5)
        assert values.median() > 0.6 and values.max() < 1.3
        assert part.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
def test_step_is_skipped_without_a_host_sync(value, first):
    """Neither weights nor momenta change, and later steps are the same to the last bit."""
    torch.manual_seed(0)
    models = [GPT2Model(tiny_config()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, CONFIG) for model in models]
    for step in range(4):
        is_skipped = step == (0 if first else 2)
        for model, optimizer, on_device in zip(models, optimizers, (True, False), strict=True):
            give_gradients(list(model.parameters()), step, value if is_skipped else None)
            if on_device:
                optimizer.found_inf = torch.tensor(float(is_skipped))
            if on_device or not is_skipped:
                optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
        for key, state in optimizers[1].state[b].items():
            assert torch.equal(optimizers[0].state[a][key], state)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float32)]
)
def test_products_have_the_precision_of_the_training(precision, dtype):
    model = GPT2Model(tiny_config())
    optimizer = build_optimizer(model, CONFIG)
    give_gradients(list(model.parameters()), 0)
    use_precision(optimizer, Precision(precision, torch.device("cpu")))
    with Counted() as counted:
        optimizer.step()
    assert counted.dtypes["bmm", dtype] == counted.counts["bmm"] > 0
    assert counted.dtypes["baddbmm", dtype] == counted.counts["baddbmm"] > 0


class Counted(TorchDispatchMode):
    """Counts the operations by name, and the number formats of their results."""

    def __init__(self):
        super().__init__()
        self.counts, self.dtypes = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += 1
        result = operation(*args, **(kwargs or {}))
        self.dtypes[operation.overloadpacket.__name__, getattr(result, "dtype", None)] += 1
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_are_orthogonal_in_each_format(dtype):
    matrices = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    with Counted() as counted:
        result = orthogonal(matrices.to(dtype), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert counted.dtypes["bmm", dtype] == counted.counts["bmm"] == 5
    assert counted.dtypes["baddbmm", dtype] == counted.counts["baddbmm"] == 10
    exact = torch.linalg.svd(matrices, full_matrices=False)
    values = exact.U.mT @ result.float() @ exact.Vh.mT  # near the diagonal of ones
    torch.testing.assert_close(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2)), rtol=0, atol=0.05)
    assert values.diagonal(dim1=1, dim2=2).min() > 0.6 and values.diagonal(dim1=1, dim2=2).max() < 1.3


def test_few_products_and_no_read_of_a_value():
    """A step of GPT-2 124M on the meta device, which has no values, so that reading one would raise an error."""
    model = meta_model(GPT2Config())
    optimizer, _ = build_optimizer(model, CONFIG).parts
    for weight in model.parameters():
        weight.grad = torch.empty_like(weight)
    optimizer.found_inf = torch.empty((), device="meta")
    with Counted() as counted:
        optimizer.step()
    assert counted.counts["bmm"] + counted.counts["baddbmm"] == 4 * 5 * 3  # torch.optim.Muon: 48 * 5 * 3
    assert not counted.counts["mm"] + counted.counts["addmm"]
