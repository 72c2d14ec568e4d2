"""All contestants train the same model on the same tokens; figures follow from the times. Speed is not tested."""

import json
import re

import pytest
import torch

from gpt2.analysis.tables import table
from gpt2.benchmarks.contestants import Workload, contestants
from gpt2.benchmarks.training import COLUMNS, TrainingComparison
from gpt2.config import TrainingBenchmark, TrainingConfig
from gpt2.errors import UserError
from gpt2.validation import validate
from tests.conftest import ROOT, Workspace
from tests.helpers import tiny_config

SHAPE = ["model.num_layers=1", "model.d_model=32", "model.d_ff=64", "model.vocab_size=300", "model.context_length=16"]
SMALL = ["model=gpt2_nano", *SHAPE, "train.batch_size=2", "train.num_workers=0", "repetitions=2"]
SMALL += ["train.precision=fp32"]

PEER = """
from gpt2.model import GPT2Model

def sgd(config, state, train):
    model = GPT2Model(config)
    model.load_state_dict(state)

    def step(micro_batches):
        losses = [model(input_ids, targets=targets)[1] for input_ids, targets in micro_batches]
        loss = sum(losses) / len(losses)
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= train.learning_rate * parameter.grad
            parameter.grad = None
        return loss.detach()

    return step

def fp32_only(config, state, train):
    if train.precision != "fp32":
        raise NotImplementedError("fp32 only")
    return sgd(config, state, train)

ways = {"slow": sgd, "other": fp32_only}
"""


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's peak is measured by small products, as speed is not tested."""
    monkeypatch.setattr("gpt2.benchmarks.common.MATRIX", 64)


@pytest.fixture
def peer(tmp_path) -> str:
    (tmp_path / "toy.py").write_text(PEER)
    return str(tmp_path / "toy.py")


def small(**fields) -> TrainingBenchmark:
    train = {"batch_size": 2, "num_workers": 0, "device": "cpu", "precision": "fp32", **fields.pop("train", {})}
    return TrainingBenchmark(model=tiny_config(), train=TrainingConfig(**train), **{"repetitions": 2, **fields})


@pytest.mark.parametrize("train", [{}, {"accumulation_steps": 3}, {"gradient_checkpointing": True}])
def test_all_contestants_take_the_same_first_step(tmp_path, peer, train):
    comparison = TrainingComparison(small(peer=f"{peer}:sgd", train=train, steps=2), tmp_path)
    rows = comparison.compare()
    assert [row["contestant"] for row in rows] == ["transformers, fp32", "toy, fp32", "gpt2, fp32"]
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=1e-5)
        assert len(row["step_seconds_of_each"]) == 2
        tokens = 2 * 16 * train.get("accumulation_steps", 1)
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / rows[1]["tokens_per_second"])  # to the peer
        flops = row["tokens_per_second"] * comparison.workload.flops_per_token
        assert row["mfu"] == pytest.approx(flops / comparison.peaks["fp32"])
    assert rows[2]["last_loss"] == pytest.approx(rows[0]["last_loss"], abs=1e-4)  # so the updates are equal as well
    assert len(table(rows, COLUMNS).splitlines()) == 4


def test_losses_show_rounding(tmp_path):
    rows = TrainingComparison(small(precisions=["fp32", "bf16", "auto"]), tmp_path).compare()
    assert [row["precision"] for row in rows] == ["fp32", "fp32", "bf16", "bf16"]
    assert all(row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=0.05) for row in rows)
    assert rows[2]["first_loss"] != rows[0]["first_loss"]
    assert rows[0]["ratio"] == 1  # it is the baseline: the only peer, in its first precision


def test_unsupported_precision_of_a_peer_is_left_out(tmp_path, peer, caplog):
    comparison = TrainingComparison(small(peer=f"{peer}:fp32_only", precisions=["fp32", "bf16"]), tmp_path)
    names = [row["contestant"] for row in comparison.compare()]
    assert names == ["transformers, fp32", "toy, fp32", "gpt2, fp32", "transformers, bf16", "gpt2, bf16"]
    assert comparison.left_out == {"toy, bf16": "fp32 only"}
    assert "toy, bf16 is left out: fp32 only" in caplog.text


def test_peer_has_several_variants_and_ours_is_compiled_too(tmp_path, peer):
    train = {"compile": True}
    workload = Workload(small(peer=f"{peer}:ways", precisions=["fp32", "bf16"], train=train), tmp_path, 1)
    lines = ["transformers", "transformers, compiled", "slow", "other", "gpt2", "gpt2, compiled"]
    names = [f"{line}, {precision}" for precision in ("fp32", "bf16") for line in lines]
    assert [contestant.name for contestant in contestants(workload)] == names


def test_batches_match_those_of_peers_and_all_differ(tmp_path):
    workload = Workload(small(train={"accumulation_steps": 2}), tmp_path, 4)
    assert len(workload.batches) == 4
    first = torch.stack([batch["input_ids"] for batches in workload.batches for batch in batches])
    assert len(first.flatten(0, 1).unique(dim=0)) == 4 * 2 * 2
    for batches, pairs in zip(workload.batches, workload.on_device(), strict=True):
        for batch, (input_ids, targets) in zip(batches, pairs, strict=True):
            assert torch.equal(batch["input_ids"], input_ids)
            assert torch.equal(input_ids[:, 1:], targets[:, :-1])
    assert [c.name for c in contestants(workload)] == ["transformers, fp32", "gpt2, fp32"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"peer": "nowhere.py:step"}, "peer: 'nowhere.py:step' must be FILE.py:FUNCTION with an existing file"),
        ({"peer": str(ROOT / "train.py")}, "must be FILE.py:FUNCTION"),
        ({"precisions": []}, "precisions: "),
        ({"precisions": ["bf16"], "train": {"mixed_precision": False}}, "contradict train.mixed_precision=false"),
        ({"steps": 0}, "steps: 0 is not"),
        ({"warmup": 0}, "warmup: 0 is not"),
        ({"train": {"batch_size": 0}}, "train.batch_size: 0 is not"),
    ],
)
def test_invalid_configuration_is_one_problem(fields, complaint):
    (problem,) = validate(small(**fields))
    assert re.search(re.escape(complaint), problem)


def test_command_prints_a_table_and_writes_json(workspace: Workspace, peer):
    done = workspace.module("gpt2.main", "benchmark", "training", *SMALL, f"peer={peer}:sgd", "json=speed/result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((workspace.folder / "speed" / "result.json").read_text())
    assert result["config"]["model"]["dropout"] == 0
    assert [row["contestant"] for row in result["results"]] == ["transformers, fp32", "toy, fp32", "gpt2, fp32"]
    lines = done.stdout.splitlines()
    for row in result["results"]:
        (line,) = (line for line in lines if line.startswith(row["contestant"]))
        assert f" {row['tokens_per_second']:,.0f} " in line
        assert f" {row['step_seconds'] * 1e3:,.1f} " in line
    assert result["hardware"]["cpu"]
    assert "written to speed/result.json" in done.stdout


def test_missing_function_of_a_peer_is_an_error(tmp_path, peer):
    with pytest.raises(UserError) as raised:
        TrainingComparison(small(peer=f"{peer}:missing"), tmp_path).compare()
    assert raised.value.problems == [f"peer: {peer} has no function missing"]
