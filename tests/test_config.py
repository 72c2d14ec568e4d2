"""Defaults and validation of the configuration dataclasses."""

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from gpt2.config import DataConfig, GenerateRun, GPT2Config, InferenceConfig, OptunaConfig, TrainingConfig, TrainRun
from gpt2.validation import validate
from tests.helpers import ROOT

GROUPS = {"model": GPT2Config, "train": TrainingConfig, "data": DataConfig, "inference": InferenceConfig}


def run_with(group: str, **fields) -> TrainRun:
    """The default run with some fields of one group changed."""
    return TrainRun(**{group: GROUPS[group](**fields)})


# ---------------------------------------------------------------------------------------------------------------------
# Imports


def test_importing_the_configuration_imports_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "wandb", "tokenizers", "numpy"}
    code = f"import sys, gpt2.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize("run", [TrainRun(), GenerateRun()], ids=["train", "generate"])
def test_defaults_are_valid(run):
    assert validate(run) == []


BAD = [
    *(("model", name, 0) for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff")),
    *(("model", name, bad) for name in ("dropout", "attention_dropout", "residual_dropout") for bad in (-0.1, 1.0)),
    ("model", "layer_norm_epsilon", 0.0),
    ("model", "num_layers", 1001),
    ("model", "d_model", 1_200_000),  # a model of 7e13 weights
    ("model", "initializer_range", 0.0),
    ("model", "initializer_range", -0.02),
    ("model", "num_heads", 7),
    *(("train", name, 0) for name in ("batch_size", "accumulation_steps", "max_epochs", "max_steps", "eval_batches")),
    *(("train", name, 0) for name in ("save_every", "eval_every", "log_every")),
    *(("train", name, -1) for name in ("warmup_steps", "num_workers", "seed")),
    *(("train", name, -1e-9) for name in ("weight_decay", "gradient_clip", "min_learning_rate")),
    *(("train", name, 0.0) for name in ("learning_rate", "epsilon", "max_training_hours")),
    *(("train", name, bad) for name in ("beta1", "beta2") for bad in (-0.1, 1.0)),
    ("train", "seed", 2**63),
    ("train", "min_learning_rate", 1.0),
    ("train", "device", "gpu"),
    *(("train", "checkpoint_dir", bad) for bad in ("a/b", "/tmp", "../x", ".")),
    ("data", "max_length", 0),
    ("data", "max_length", 1025),
    ("data", "preprocessing_num_workers", 0),
    ("data", "vocab_size", 256),
    *(("data", "validation_fraction", bad) for bad in (0.0, 1.0, -0.1)),
    ("data", "files", []),
    ("data", "files", ["no/such/file.txt"]),
    ("data", "tokenizer", "no-such-folder"),
    *(("inference", name, 0) for name in ("max_new_tokens", "num_return_sequences", "top_k")),
    ("inference", "temperature", -0.1),
    *(("inference", "top_p", bad) for bad in (0.0, 1.01)),
    *(("inference", "min_p", bad) for bad in (-0.1, 1.01)),
    ("inference", "repetition_penalty", 0.0),
    *(("inference", "seed", bad) for bad in (-1, 2**63)),
]


@pytest.mark.parametrize(("group", "field", "bad"), BAD, ids=str)
def test_value_out_of_bounds_is_reported(group, field, bad):
    problems = validate(run_with(group, **{field: bad}))
    assert len(problems) == 1
    assert problems[0].startswith(f"{group}.{field}: ")
    assert "\n" not in problems[0]


def numeric_fields() -> list[tuple[str, str]]:
    """All fields that hold a number, in all groups, so that a new field without a bound is detected."""
    return [
        (group, name)
        for group, config in GROUPS.items()
        for name, hint in typing.get_type_hints(config).items()
        if {int, float} & {hint, *typing.get_args(hint)}
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("group", "field"), numeric_fields())
def test_nan_and_infinity_are_rejected(group, field, bad):
    assert any(problem.startswith(f"{group}.{field}: {bad}") for problem in validate(run_with(group, **{field: bad})))


GOOD = [
    *(("train", name, None) for name in ("max_steps", "min_learning_rate", "eval_batches")),
    *(("train", name, 0) for name in ("warmup_steps", "num_workers", "weight_decay", "gradient_clip", "seed", "beta1")),
    ("train", "seed", 2**63 - 1),
    ("train", "min_learning_rate", 3e-4),
    *(("train", "device", name) for name in ("cpu", "cuda", "cuda:1", "mps")),
    *(("model", name, 0.0) for name in ("dropout", "attention_dropout", "residual_dropout")),
    ("model", "num_heads", 1),
    ("data", "vocab_size", 257),
    ("data", "max_length", 1),
    *(("data", "tokenizer", name) for name in ("bytes", "train", str(ROOT))),
    ("data", "files", [__file__]),
    *(("inference", name, None) for name in ("top_k", "top_p", "seed")),
    ("inference", "temperature", 0.0),
    ("inference", "top_p", 1.0),
    ("inference", "repetition_penalty", 0.9),
]


@pytest.mark.parametrize(("group", "field", "good"), GOOD, ids=str)
def test_value_on_the_bound_is_valid(group, field, good):
    assert validate(run_with(group, **{field: good})) == []


def test_all_problems_are_reported_at_once():
    run = TrainRun(
        name="a b",
        model=GPT2Config(d_model=0, dropout=2.0, context_length=0),
        train=TrainingConfig(batch_size=0, learning_rate=float("nan")),
        data=DataConfig(vocab_size=3, tokenizer="no-such-folder", max_length=1),
        inference=InferenceConfig(temperature=-1.0),
    )
    keys = {problem.split(":")[0] for problem in validate(run)}
    assert keys == {
        *("name", "model.context_length", "model.d_model", "model.dropout"),
        *("train.batch_size", "train.learning_rate"),
        *("data.vocab_size", "data.tokenizer", "data.max_length", "inference.temperature"),
    }


def test_num_heads_error_suggests_the_nearest_divisor():
    (problem,) = validate(run_with("model", d_model=96, num_heads=7))
    assert "96" in problem
    assert re.search(r"\b(6|8) would", problem)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_contradicts_mixed_precision_false(precision):
    config = TrainingConfig(precision=precision, mixed_precision=False)
    assert [problem.split(":")[0] for problem in validate(config, "train.")] == ["train.precision"]
    config.mixed_precision = True
    assert validate(config, "train.") == []


@pytest.mark.parametrize(
    ("field", "bad", "choices"),
    [
        ("direction", "MINIMIZE", "none of minimize, maximize"),
        *((name, 0, "at least 1") for name in ("n_trials", "timeout")),
        *((name, -1, "at least 0") for name in ("n_startup_trials", "n_warmup_steps")),
    ],
)
def test_invalid_study_settings(field, bad, choices):
    (problem,) = validate(OptunaConfig(**{field: bad}), "optuna.")
    assert problem.startswith(f"optuna.{field}: ")
    assert choices in problem


@pytest.mark.parametrize(
    ("field", "good"),
    [
        *(("direction", name) for name in ("minimize", "maximize")),
        *((name, 0) for name in ("n_startup_trials", "n_warmup_steps")),
        *(("n_trials", 1), ("timeout", 1), ("timeout", None)),
    ],
)
def test_valid_study_settings(field, good):
    assert validate(OptunaConfig(**{field: good}), "optuna.") == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "/tmp/x", "a b", "../a", "a" * 101, "a\n", "a*", "a;b", "`touch p`"]
)
def test_invalid_run_names(name):
    assert [problem.split(":")[0] for problem in validate(TrainRun(name=name))] == ["name"]


@pytest.mark.parametrize("name", ["gpt2", "a-b_c.d", "7", "größe"])
def test_valid_run_names(name):
    assert validate(TrainRun(name=name)) == []


@pytest.mark.parametrize("folder", ["..", ""])
def test_checkpoint_dir_must_be_a_plain_name(folder):
    assert [problem.split(":")[0] for problem in validate(run_with("train", checkpoint_dir=folder))] == [
        "train.checkpoint_dir"
    ]


def test_integer_beyond_float_range_is_rejected():
    """Integers in YAML have no upper limit."""
    assert [problem.split(":")[0] for problem in validate(run_with("train", seed=10**400))] == ["train.seed"]


def test_invalid_regular_expression_is_rejected():
    for pattern in ("[", "(" * 5000, "a{99999999999}", "((a{1000}){1000}){1000}", "(a{0}b{2000}){2000}", "\\", "(?R)"):
        (problem,) = validate(run_with("data", document_start=pattern))
        assert problem.startswith("data.document_start: ")
        assert len(problem) < 300
    for pattern in ("^ = [^=]", "(a+)+$", "a{1000}", r"\d{1,3}[.) ]{0,5}[A-Z]{2,}", "(?i)chapter"):
        assert validate(run_with("data", document_start=pattern)) == []


def test_invalid_device_number_is_rejected():
    assert [problem.split(":")[0] for problem in validate(run_with("train", device="cuda:one"))] == ["train.device"]


@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_generate_run_validates_inference_settings(field):
    run = GenerateRun(inference=InferenceConfig(**{field: -1.0}))
    assert [problem.split(":")[0] for problem in validate(run)] == [f"inference.{field}"]


def test_generate_run_validates_device():
    assert [problem.split(":")[0] for problem in validate(GenerateRun(device="gpu"))] == ["device"]


def test_configurations_share_no_mutable_default():
    first, second = TrainRun(), TrainRun()
    for field in dataclasses.fields(TrainRun):
        value = getattr(first, field.name)
        assert not dataclasses.is_dataclass(value) or value is not getattr(second, field.name)
    first.data.exclude.append("x")
    assert second.data.exclude == []


def test_unmatched_file_pattern_is_named(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("a")
    patterns = [str(tmp_path / "**" / "*.txt"), str(tmp_path / "*.md")]
    (problem,) = validate(run_with("data", files=patterns))
    assert repr(patterns[1]) in problem
    assert patterns[0] not in problem
