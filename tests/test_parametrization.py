"""`model.parametrization=mup`: quantities that do not depend on the width, and its use with all other features."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

import tests.test_train as training
from gpt2.checkpoint.pretrained import export, finetuning_config, open_model
from gpt2.config import OPTIMIZERS, GPT2Config, TrainingConfig
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.ops.cpu_inference import SlicedLinear, pack_linears
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.tracking.tracker import read_metrics
from gpt2.train import Trainer
from gpt2.training.optimizer import build_optimizer, learning_rate, stepping
from tests.checkpoint.test_export import save_checkpoint
from tests.conftest import TINY, Workspace
from tests.helpers import finish, noisy_model, random_ids, tiny_config

blocks = training.blocks  # the fixture
SCALED = [name for name, traits in OPTIMIZERS.items() if traits.scales]
BASE = {"mup_base_width": 32, "mup_base_head_width": 8}


def mup(width: int = 32, heads: int = 4, parametrization: str = "mup", **fields) -> GPT2Config:
    return tiny_config(
        d_model=width, num_heads=heads, d_ff=4 * width, parametrization=parametrization, **{**BASE, **fields}
    )


def trained(config: GPT2Config, steps: int = 4, **train) -> GPT2Model:
    """A model after some steps on one batch, at a rate high enough to change its outputs."""
    torch.manual_seed(0)
    model = GPT2Model(config)
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=1e-2, weight_decay=0.1, **train))
    ids = random_ids(config, 8, config.context_length)
    for _ in range(steps):
        optimizer.zero_grad()
        with stepping(optimizer):
            model(ids, labels=ids)[1].backward()
            optimizer.step()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The width


@torch.no_grad()
def activations(model: GPT2Model) -> dict[str, Tensor]:
    """Attention's scores, the output of each block, and the logits."""
    found: dict[str, Tensor] = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, inputs, out, n=number: found.update({f"block {n}": out}))
    attention = model.blocks[-1].attention

    def scores(_, inputs, out: Tensor) -> None:
        heads = out.unflatten(-1, (3, model.config.num_heads, -1)).transpose(1, 3)
        found["scores"] = heads[:, :, 0] @ heads[:, :, 1].mT * (attention.scale or heads.size(-1) ** -0.5)

    attention.qkv.register_forward_hook(scores)
    found["logits"], _ = model(random_ids(model.config, 8, model.config.context_length))
    return found


def growth(optimizer: str, parametrization: str, heads: int) -> dict[str, float]:
    """How much more the activations change in 4 steps if the model is 8 times as wide."""
    sizes: list[dict[str, float]] = []
    for width in (32, 256):
        config = mup(width, heads or width // 8, parametrization)
        before, after = (activations(trained(config, steps, optimizer=optimizer)) for steps in (0, 4))
        sizes.append({name: (after[name] - before[name]).square().mean().sqrt().item() for name in before})
    return {name: sizes[1][name] / sizes[0][name] for name in sizes[0]}


@pytest.mark.parametrize("heads", [4, 0], ids=["wider heads", "more heads"])
@pytest.mark.parametrize("optimizer", SCALED)
def test_updates_change_activations_independently_of_width_only_with_mup(optimizer, heads):
    grown = growth(optimizer, "mup", heads)
    assert 1 / 4 < grown.pop("scores") < 1.5, "those of narrow heads begin with more noise"
    assert all(0.7 < ratio < 1.4 for ratio in grown.values()), grown
    assert min(growth(optimizer, "standard", heads).values()) > 2.5


@pytest.mark.parametrize("optimizer", SCALED)
def test_mup_is_standard_at_its_base(optimizer):
    ours, standard = (trained(mup(parametrization=name), optimizer=optimizer) for name in ("mup", "standard"))
    assert_close(ours.state_dict(), standard.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("optimizer", "factor"), [("adamw", 1 / 4), ("muon", 1 / 2), ("schedule_free", 1 / 4)])
def test_matrices_of_blocks_have_a_rate_by_width_and_all_matrices_the_same_decay(optimizer, factor):
    model = GPT2Model(mup(128))
    config = TrainingConfig(learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    group_of = {id(p): group for group in build_optimizer(model, config).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        is_hidden = name.startswith("blocks.") and parameter.dim() == 2
        assert group["lr"] == 1e-2 * group.get("rate_factor", 1), name
        assert group["lr"] == pytest.approx(1e-2 * (factor if is_hidden else 1)), name
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 if parameter.dim() == 2 else 0), name


def test_adafactor_is_refused_because_it_bounds_its_rate_at_any_width(workspace: Workspace, blocks):
    arguments = ("model.parametrization=mup", "train.optimizer=adafactor")
    refused = workspace.run("train.py", *TINY, *arguments, expect=2).stderr
    assert "train.optimizer: adafactor does not scale learning rates by width" in refused
    assert "use adamw, muon, schedule_free" in refused
    loaders = (DataLoader(blocks),) * 2
    with pytest.raises(UserError, match="adafactor does not scale"):  # as in fine-tuning of a model with mup
        Trainer(GPT2Model(mup()), *loaders, TrainingConfig(optimizer="adafactor"))


@pytest.mark.parametrize(("width", "heads", "scale"), [(32, 4, 8**-0.5), (64, 8, 8**-0.5), (64, 4, 8**0.5 / 16)])
def test_scores_are_divided_by_the_head_width_instead_of_its_root(width, heads, scale):
    assert [b.attention.scale for b in GPT2Model(mup(width, heads)).blocks] == [pytest.approx(scale)] * 2


def test_initial_embeddings_do_not_depend_on_the_width_and_hidden_matrices_do():
    torch.manual_seed(0)
    weights = {name: tensor.std().item() for name, tensor in GPT2Model(mup(512, num_layers=1)).state_dict().items()}
    assert weights["token_embedding.weight"] == pytest.approx(0.02, rel=0.05)
    assert weights["position_embedding.weight"] == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.0.attention.qkv.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert weights["blocks.0.feed_forward.down.weight"] == pytest.approx(0.02 / 4 / 2**0.5, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Everything else


def test_all_implementations_agree_with_mup():
    model = noisy_model(mup(64, heads=2)).eval()
    ids = random_ids(model.config, 3, 12)
    logits, loss = model(ids, labels=ids)
    standard = GPT2Model(replace(model.config, parametrization="standard")).eval()
    standard.load_state_dict(model.state_dict())
    assert not torch.allclose(standard(ids)[0] / 2, logits, atol=1e-2), "the scores have no factor"

    assert_close(model(ids, labels=ids, return_logits=False)[1], loss)
    assert_close(model.token_losses(ids[:, :-1], ids[:, 1:]).mean(), loss)
    texts = [finish(model.generate(ids[:, :4], 20, do_sample=False, use_cache=cached))[1] for cached in (True, False)]
    assert torch.equal(*texts)
    model.train().gradient_checkpointing = True  # a gradient selects attention by explicit products
    assert_close(model(ids, labels=ids)[1], loss)
    pack_linears(model.eval(), kind=SlicedLinear)
    assert_close(model(ids)[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_an_export_computes_the_same_in_transformers(tmp_path, use_bias):
    from transformers import GPT2LMHeadModel

    config = mup(96, heads=2, vocab_size=257, use_bias=use_bias)  # no ratio is a power of two
    save_checkpoint(tmp_path / "a.pth", config, GPT2Tokenizer.of_bytes())
    ours = open_model(str(tmp_path / "a.pth"))
    export(ours, tmp_path / "out")
    ids = random_ids(config, 3, 12)
    logits = ours.build().eval()(ids)[0]
    again = open_model(str(tmp_path / "out"))
    assert again.config.parametrization == "standard"
    assert (tmp_path / "out" / "README.md").read_text().count("mup") == 1, "in the table of the training alone"
    assert_close(GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert_close(again.build().eval()(ids)[0], logits, rtol=1e-5, atol=1e-5)


def test_a_run_with_mup_logs_the_rate_of_the_schedule(workspace: Workspace):
    workspace.run("train.py", *TINY, "model.parametrization=mup", "train.log_every=1", "hydra.run.dir=run")
    config = TrainingConfig(max_steps=8, warmup_steps=2)
    rows = read_metrics(workspace.folder / "run" / "metrics.jsonl")
    logged = [row["train/learning_rate"] for row in rows if "train/loss" in row]
    assert logged == [learning_rate(step, 8, config) for step in range(8)]


def test_fine_tuning_keeps_the_parametrization_of_the_weights(tmp_path):
    save_checkpoint(tmp_path / "a.pth", mup(), GPT2Tokenizer.of_bytes())
    trained = open_model(str(tmp_path / "a.pth"))
    assert finetuning_config(trained, GPT2Config(dropout=0.3), {"dropout"}) == mup(dropout=0.3)
    with pytest.raises(UserError, match=r"model.parametrization: standard contradicts .*, which has mup"):
        finetuning_config(trained, GPT2Config(), {"parametrization"})
