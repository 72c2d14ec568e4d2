"""The presets of conf/experiment: composition, the tokens of a step in their comments, and `plan=true`."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt2.cli import messages
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose
from gpt2.config import TrainRun
from gpt2.model import meta_model
from gpt2.runtime.device import Precision
from gpt2.runtime.dist_env import DistEnv
from gpt2.runtime.repository import CONF
from gpt2.tracking.tracker import read_metrics
from gpt2.training import cost
from gpt2.training.compile import ComputePlan
from gpt2.validation import validate, validate_distributed
from tests.conftest import TINY, Workspace

PRESETS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
LARGE = [name for name in PRESETS if name.startswith("gpt2_")]


def composed(name: str, text: Path, *more: str) -> TrainRun:
    """The configuration of a preset. With plan=true, the shape of OpenAI's weights is known without the Hub."""
    files = [f"data.files=[{text}]"] if "shakespeare" in name else []
    overrides = [f"experiment={name}", *files, "plan=true", *more]
    config = resolve("train", compose("train", overrides), overrides)
    assert isinstance(config, TrainRun)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_its_comment_has_the_tokens_of_a_step(name, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = composed(name, tmp_path / "a.txt")
    assert validate(config) == []
    assert config.name == name
    comment = (CONF / "experiment" / f"{name}.yaml").read_text().split("\n\n")[1]
    (tokens,) = re.findall(r"[Ss]teps of ([\d,]+)\s(?:# )?tokens", comment)
    assert int(tokens.replace(",", "")) == (
        config.train.batch_size * config.train.accumulation_steps * config.data.max_length
    )
    model = meta_model(replace(config.model, vocab_size=messages.vocabulary_size(config)))
    work = cost.Work(model, config.train, config.data.max_length)
    gpu = ComputePlan(torch.device("cuda"), Precision("bf16", torch.device("cpu")), "PyTorch", compiled=False)
    needed = sum(cost.memory_needed(work, gpu).values()) / 1e9
    assert re.findall(r"pass needs (\d+)\sGB", comment) in ([], [f"{needed:.0f}"])


SIZES = {"124m": 12, "350m": 24, "774m": 36, "1558m": 48}
STEPS = {"openwebtext": 600_000, "fineweb": 18_865, "muon": 18_865}
RATES = {"gpt2_124m_openwebtext": 6e-4, "gpt2_124m_fineweb": 6e-4, "gpt2_124m_muon": 1.8e-3}


@pytest.mark.parametrize("name", LARGE)
def test_large_presets_are_the_recipes_they_name(name, tmp_path):
    config, (_, size, data) = composed(name, tmp_path), name.split("_")
    train, model = config.train, config.model
    assert (model.num_layers, train.max_steps, train.weight_decay, train.beta2) == (SIZES[size], STEPS[data], 0.1, 0.95)
    assert {model.dropout, model.attention_dropout, model.residual_dropout} == {0.0}
    assert train.learning_rate == RATES.get(name, train.learning_rate) <= 1.8e-3
    assert train.warmup_steps == (2000 if data == "openwebtext" else 700)
    assert train.min_learning_rate == pytest.approx(train.learning_rate / 10 if data == "openwebtext" else 0)
    assert "fineweb" in config.data.dataset_name or data == "openwebtext"
    assert train.optimizer == ("muon" if data == "muon" else "adamw")
    for ranks in (1, 2, 4, 8, 16):
        assert validate_distributed(config.distributed, train, DistEnv(0, ranks, 0, 8, by_torchrun=ranks > 1)) == []
    hours_on_one_gpu = train.max_steps * 524_288 / 30_000 / 3600  # for the largest model
    assert train.max_training_hours > hours_on_one_gpu
    assert train.max_epochs * 9e9 > train.max_steps * 480 * 1024


def test_small_presets_are_the_recipes_they_name(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    baby, tuned = (composed(name, tmp_path / "a.txt") for name in ("shakespeare_char_gpu", "finetune_shakespeare"))
    shape = (baby.model.num_layers, baby.model.num_heads, baby.model.d_model, baby.model.d_ff, baby.data.max_length)
    assert shape == (6, 6, 384, 1536, 256)
    assert (baby.model.dropout, baby.train.batch_size, baby.train.max_steps) == (0.2, 64, 5000)
    assert baby.train.max_epochs * 1_003_854 / 256 / 64 > 5000
    assert (tuned.train.init_from, tuned.model.num_layers, tuned.model.dropout) == ("gpt2", 12, 0.0)
    assert (tuned.train.learning_rate, tuned.train.min_learning_rate, tuned.train.max_steps) == (3e-5, 3e-5, 20)
    larger = composed("finetune_shakespeare", tmp_path / "a.txt", "train.init_from=gpt2-xl", "model.context_length=99")
    assert (larger.model.num_layers, larger.model.d_model, larger.data.max_length) == (48, 1600, 99)


def test_debug_exercises_everything_in_a_few_steps(workspace: Workspace):
    done = workspace.run("train.py", "experiment=debug")
    (run,) = workspace.runs()
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records if "val/loss" in record] == [2, 4, 5]
    assert (run / "checkpoints" / "best_model.pth").exists()
    assert (run / "samples.md").read_text().count("## Step ") == 3
    assert done.stdout.count(" left\n") == 4  # from the second step
    assert "W&B" not in done.stdout


def test_plan_prints_the_cost_and_writes_nothing(workspace: Workspace):
    before = sorted(workspace.folder.rglob("*"))
    done = workspace.run("train.py", *TINY, "plan=true", "wandb=online")
    assert sorted(workspace.folder.rglob("*")) == before
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["Model", "Run", "On", "Cost", "Memory", "Time"]
    assert lines[1].startswith("Run     8 steps of 128 tokens (4 blocks), at most 10 epochs, at most 12 hours")
    assert lines[3].startswith("Cost    1,024 tokens and ")
    assert re.fullmatch(r"Memory  about [\d.]+ GB \(.*\); there are [\d.]+ GB", lines[4])
    assert re.match(r"Time    about 0:0\d at [\d,]+ tokens/s, estimated from whole passes", lines[5])

    refused = workspace.run("train.py", *TINY, "plan=true", "-m", "train.seed=1,2", expect=2)
    assert refused.stderr == "error: plan=true: one run at a time, without -m\n"


def test_plan_of_a_resumed_run_counts_the_steps_that_are_left(trained: Workspace):
    (run,) = trained.runs()
    before = sorted(trained.folder.rglob("*"))
    done = trained.run("train.py", f"resume={run}", "train.max_steps=20", "plan=true")
    assert sorted(trained.folder.rglob("*")) == before
    assert "Run     12 steps of 128 tokens (4 blocks), 8 are done already" in done.stdout
    log = (run / "train.log").read_text()
    assert f"{done.stdout.splitlines()[0]}\n" in log
    tuned = trained.run("train.py", *TINY, f"train.init_from={run}", "plan=true")
    assert f"{tuned.stdout.splitlines()[0]}\n" in log


def test_plan_of_a_large_model_times_a_part(tmp_path, monkeypatch, capsys):
    def time_part(part: cost.Work, _plan: object, min_seconds: float) -> tuple[float, float]:
        return part.flops_per_step / 1e12, 0.0  # at 1 TFLOP/s, the first part takes 0.18 s and 4 layers 0.34

    monkeypatch.setattr(cost, "_time_part", time_part)
    monkeypatch.setattr(cost, "ENOUGH_SECONDS", 0.3)
    monkeypatch.setattr(messages, "memory_of", lambda _device: 80e9)
    monkeypatch.setattr(messages, "keep_freed_memory", lambda: None)  # it would change the rest of this process
    messages.print_plan(composed("gpt2_1558m_openwebtext", tmp_path, "train.device=cpu", "train.precision=bf16"))
    out = capsys.readouterr().out
    assert "1,557,611,200 parameters" in out
    assert "Cost    314,572,800,000 tokens and 3.2e+21 FLOPs\n" in out
    assert "Memory  about 52 GB (weights, gradients and optimizer 28, activations 23, logits 0.96); there are " in out
    assert "a smaller train.batch_size" not in out
    (hours, parts), *_ = re.findall(r"Time    about ([\d,]+) hours at 97 tokens/s, estimated from a pass of (.*);", out)
    assert float(hours.replace(",", "")) == pytest.approx(600_000 * 524_288 * 10.28e9 / 1e12 / 3600, rel=1e-3)
    assert parts == "4 of 48 layers, 1 of 8 blocks, 256 of 1,024 tokens, computation only"
    assert re.search(r"; train.max_training_hours=100000 ends it after at most 35,0[\d,]+ tokens\n$", out)

    messages.print_plan(composed("gpt2_1558m_openwebtext", tmp_path, "train.device=cpu", "train.batch_size=24"))
    assert (
        "there are 80 GB; train.gradient_checkpointing=true and a smaller train.batch_size" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("seconds", "spent", "end"),
    [
        (0.1, 0.0, "computation only"),
        (0.5, 0.0, "computation only: with evaluations, train.max_training_hours=0.1 may end it early"),
        (0.1, 300.0, "computation only: with evaluations, train.max_training_hours=0.1 may end it early"),
        (1.0, 0.0, "; train.max_training_hours=0.1 ends it after at most 737,280 tokens"),
        (1.0, 400.0, "; train.max_training_hours=0.1 ends it after at most 0 tokens"),
    ],
)
def test_plan_warns_of_the_limit_of_hours(tmp_path, monkeypatch, seconds, spent, end):
    """The 450 steps of the quickstart take between an eighth of its time limit and more than the limit."""
    config = composed("quickstart", tmp_path, "train.device=cpu", "data.tokenizer=bytes")
    work = messages.planned_work(config)
    timing = SimpleNamespace(step=seconds, layers=work.model.config.num_layers, rows=work.rows, tokens=work.length)
    monkeypatch.setattr(messages, "time_step", lambda *_: timing)
    plan = SimpleNamespace(compiled=False)
    assert messages.time_of_run(work, plan, config.train.max_steps, spent).endswith(end)


@pytest.mark.slow
def test_plan_of_a_model_that_does_not_fit_here(workspace: Workspace):
    out = workspace.run("train.py", "experiment=gpt2_774m_openwebtext", "plan=true").stdout
    assert re.search(r"Time    about [\d,]+ hours at [\d,]+ tokens/s", out)
