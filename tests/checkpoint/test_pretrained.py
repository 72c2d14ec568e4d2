"""Opening trained models by name, fine-tuning them, and the scripts that use them."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch.testing import assert_close

from gpt2.checkpoint import run_folder
from gpt2.checkpoint.pretrained import export, finetuning_config, open_model, open_tokenizer
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose
from gpt2.cli.preflight import validate_command_line
from gpt2.config import GPT2Config
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer
from tests.checkpoint.test_export import save_checkpoint
from tests.conftest import TINY, Workspace
from tests.helpers import (
    CORPUS,
    noisy_model,
    only_a_pickle,
    python_source,
    rewrite_record,
    tiny_config,
    transformers_twin,
    with_value,
    write_tokenizer,
)

# ---------------------------------------------------------------------------------------------------------------------
# Opening


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda record: {}, "was not written by Trainer: model: missing; train: missing; progress: missing and 3 more"),
        (lambda record: with_value(record, "model.depth", 3), "this one has no model.depth$"),
        (lambda record: with_value(record, "model.num_layers", 3), r"12 missing: blocks.2.(\S+ ){3}and 9 more$"),
        (lambda record: with_value(record, "model.num_layers", 1), r"12 unexpected: blocks.1.(\S+ ){3}and 9 more$"),
    ],
)
def test_checkpoint_with_another_record_is_refused(tmp_path, change, complaint):
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    rewrite_record(tmp_path / "a.pth", change)
    with pytest.raises(UserError, match=complaint):
        open_model(str(tmp_path / "a.pth")).build()


# ---------------------------------------------------------------------------------------------------------------------
# The configuration for fine-tuning


def test_finetuning_config_follows_the_weights_except_for_requested_fields(folder):
    trained = open_model(str(folder))
    assert finetuning_config(trained, GPT2Config(), set()) == trained.config
    dropout = {"dropout": 0.3, "attention_dropout": 0.2, "residual_dropout": 0.1}
    config = finetuning_config(
        trained, GPT2Config(**dropout, context_length=8, initializer_range=0.5), {"residual_dropout"}
    )
    assert (config.dropout, config.attention_dropout, config.residual_dropout) == (0.3, 0.2, 0.1)
    assert config.initializer_range == 0.5
    assert (config.context_length, config.d_model) == (8, 16)


def test_contradictions_with_the_weights_name_both_values(folder):
    trained = open_model(str(folder))
    with pytest.raises(UserError) as refused:
        finetuning_config(trained, GPT2Config(num_heads=8, context_length=32), {"d_model"})
    assert refused.value.problems == [
        f"model.context_length: 32 contradicts train.init_from={folder}, which has 16",
        f"model.d_model: 768 contradicts train.init_from={folder}, which has 16",
        f"model.num_heads: 8 contradicts train.init_from={folder}, which has 4",
    ]


def test_shorter_context_drops_the_last_positions(folder):
    trained = open_model(str(folder))
    whole, cropped = trained.build().eval(), trained.build(tiny_config(vocab_size=257, context_length=5)).eval()
    input_ids = torch.randint(257, (2, 5), generator=torch.Generator().manual_seed(0))
    assert_close(cropped(input_ids)[0], whole(input_ids)[0], atol=0, rtol=0)
    assert cropped.position_embedding.weight.shape == (5, 16)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def test_openai_names_take_precedence_over_a_folder(workspace, folder):
    write_tokenizer(folder)
    (workspace.folder / "gpt2").mkdir()
    options = ["prompt=ab", "inference=greedy", "inference.max_new_tokens=5"]
    local = workspace.run("generate.py", f"checkpoint={folder}", *options)
    for name in ("gpt2", "openai-community/gpt2"):
        repository = workspace.cache_as_from_hub(name, folder)
        cached = workspace.run("generate.py", "checkpoint=gpt2", *options)
        assert cached.stdout == local.stdout
        assert cached.stderr.splitlines()[-2] == "gpt2 on cpu in fp32"
        shutil.rmtree(repository)


def test_model_missing_from_the_hub_cache_is_a_user_error(workspace):
    (line,) = workspace.run("evaluate.py", "checkpoint=gpt2-xl", expect=2).stderr.splitlines()
    assert "gpt2-xl: there is no such folder here, and neither the Hugging Face Hub nor" in line
    assert "config.json; " in line


def test_partially_cached_repository_is_a_user_error(workspace, folder):
    write_tokenizer(folder)
    (folder / "config.json").unlink()
    workspace.cache_as_from_hub("openai-community/gpt2", folder)
    (line,) = workspace.run("generate.py", "checkpoint=gpt2", "prompt=x", expect=2).stderr.splitlines()
    assert "neither the Hugging Face Hub nor its cache provides config.json" in line


@pytest.mark.parametrize("name", ["outputs/missing", "checkpoints/best_model.pth", ""])
def test_missing_path_is_not_looked_up_on_the_hub(workspace, name):
    (workspace.folder / "outputs").mkdir()
    (line,) = workspace.run("generate.py", f"checkpoint={name}", "prompt=x", expect=2).stderr.splitlines()
    assert f"checkpoint: there is no '{name}' here" in line


def test_weights_without_a_tokenizer_are_refused_or_use_a_given_one(workspace, folder, tmp_path):
    for name, key in (("train", "train.init_from"), ("evaluate", "checkpoint")):
        line = [f"{key}='{folder}'", "data=stdlib"]
        (problem,) = validate_command_line(name, line)
        assert f"data.tokenizer: {folder} holds no tokenizer" in problem
        (problem,) = validate_command_line(name, [*line, "data.tokenizer=train"])
        assert f"{key}={folder}" in problem
        assert problem.startswith("data.tokenizer: ")
    GPT2Tokenizer.train([python_source()], 300).to_folder(tmp_path, 16)
    (problem,) = validate_command_line("evaluate", [*line, f"data.tokenizer='{tmp_path}'"])
    assert "data.tokenizer: a tokenizer with 300 tokens does not fit checkpoint=" in problem
    text = ["data=text", "data.files=[corpus.txt]", f"checkpoint={folder}"]
    assert "loss" in workspace.run("evaluate.py", *text, "data.tokenizer=bytes").stdout


def test_weights_of_gpt2_size_without_tokenizer_use_that_of_gpt2(workspace, tmp_path):
    """The weights are from another repository of the Hub. The cached tokenizer of GPT-2 is a byte tokenizer here."""
    transformers_twin(noisy_model(tiny_config(vocab_size=50257))).save_pretrained(tmp_path / "weights")
    workspace.cache_as_from_hub("someone/model", tmp_path / "weights")
    write_tokenizer(tmp_path / "weights")
    workspace.cache_as_from_hub("openai-community/gpt2", tmp_path / "weights")
    text = ["data=text", "data.files=[corpus.txt]"]
    scored = workspace.run("evaluate.py", "checkpoint=someone/model", *text)
    written = workspace.run("generate.py", "checkpoint=someone/model", "prompt=a", "inference.max_new_tokens=3")
    for done in (scored, written):
        assert "someone/model holds no tokenizer" in done.stderr
    assert "bits per byte" in scored.stdout


def test_added_tokens_are_accepted(workspace, folder):
    """An example is a padding token beyond the model's vocabulary, which no text is encoded to."""
    tokenizer = GPT2Tokenizer.of_bytes()
    padded = GPT2Tokenizer({**tokenizer.vocabulary, "[PAD]": 257}, [])
    write_tokenizer(folder, padded)
    text = ["data=text", "data.files=[corpus.txt]"]
    assert "bits per byte" in workspace.run("evaluate.py", *text, f"checkpoint={folder}").stdout
    export(open_model(str(folder)), folder.parent / "out")
    described = json.loads((folder.parent / "out" / "tokenizer.json").read_text())
    assert [token["content"] for token in described["added_tokens"]] == ["<|endoftext|>", "[PAD]"]


def test_unreadable_weights_are_reported_before_data_are_prepared(workspace, folder):
    write_tokenizer(folder)
    only_a_pickle(folder)
    for script, key in (("train.py", "train.init_from"), ("evaluate.py", "checkpoint")):
        done = workspace.run(script, "data=text", "data.files=[corpus.txt]", f"{key}={folder}", expect=2)
        assert "a pickle" in done.stderr
        assert "Tokenizing" not in done.stdout + done.stderr


FINE_TUNE = [
    argument for argument in TINY if not argument.startswith(("model", "data.tokenizer")) or "dropout" in argument
]


def test_fine_tuning_takes_shape_and_tokenizer_and_resumes_without_the_weights(workspace, folder):
    tokenizer = GPT2Tokenizer.train([CORPUS], 257)
    write_tokenizer(folder, tokenizer)
    done = workspace.run("train.py", *FINE_TUNE, f"train.init_from={folder}", "model.dropout=0.2")
    assert f"Weights from {folder}" in done.stdout
    (run,) = workspace.runs()
    trained = open_model(str(run))
    assert trained.config == tiny_config(vocab_size=257, dropout=0.2)
    assert trained.tokenizer.fingerprint == tokenizer.fingerprint
    before, after = open_model(str(folder)).tensors(), trained.tensors()
    moved = max((before[name] - after[name]).abs().max() for name in before)
    assert 0 < moved < 0.05  # close to the weights after 8 steps
    assert trained.run["train"]["init_from"] == str(folder)
    resolved = OmegaConf.load(run / ".hydra" / "config.yaml")
    assert (resolved.model.d_model, resolved.data.max_length, resolved.data.tokenizer) == (16, 16, str(folder))
    export(trained, workspace.folder / "out")
    assert f"| started from | {folder.name} |" in (workspace.folder / "out" / "README.md").read_text()
    for file in (workspace.folder / "out").iterdir():
        assert str(workspace.folder).encode() not in file.read_bytes()

    shutil.rmtree(folder)
    resumed = workspace.run("train.py", "resume=latest", "train.max_steps=10")
    assert "Resuming after step 8" in resumed.stdout


def test_fine_tuning_starts_from_the_weights_of_a_run(trained, workspace):
    (first,) = trained.runs()
    workspace.run("train.py", *FINE_TUNE, f"train.init_from={first}", "train.learning_rate=1e-30", "name=second")
    (second,) = workspace.runs()
    assert_close(open_model(str(second)).tensors(), open_model(str(first)).tensors(), atol=1e-6, rtol=0)


def test_contradictions_are_reported_together_before_anything_is_written(workspace, folder):
    write_tokenizer(folder)
    done = workspace.run(
        "train.py", *FINE_TUNE, f"train.init_from={folder}", "model=gpt2_nano", "data.tokenizer=train", expect=2
    )
    keys = [line.split(":")[1].strip() for line in done.stderr.splitlines()]
    assert keys[0] == "data.tokenizer"
    assert {"model.context_length", "model.d_model", "model.num_layers", "model.d_ff"} <= set(keys)
    assert not (workspace.folder / "outputs").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model=gpt2"],
            {"model.d_model", "model.num_heads", "model.num_layers", "model.d_ff", "model.context_length"},
        ),
        (["model.d_model=768"], {"model.d_model"}),
        (["model.use_bias=false", "model.num_layers=3"], {"model.use_bias", "model.num_layers"}),
        ([], set()),
    ],
)
def test_explicit_defaults_contradict_the_weights(folder, overrides, expected):
    write_tokenizer(folder)
    problems = validate_command_line("train", [f"train.init_from='{folder}'", "data=stdlib", *overrides])
    assert {line.split(":")[0] for line in problems} == expected


def test_interpolated_values_count_as_requested(folder):
    write_tokenizer(folder)
    line = ["hparams_search=optuna", f"train.init_from='{folder}'", "model.dropout=0.1", "data=stdlib"]
    config = resolve("train", compose("train", line), line)
    assert (config.model.dropout, config.model.attention_dropout, config.model.residual_dropout) == (0.1, 0.1, 0.1)


def test_part_of_a_tokenizer_is_refused(tmp_path):
    GPT2Tokenizer.of_bytes().to_folder(tmp_path, context_length=8)
    assert open_tokenizer(str(tmp_path)).vocab_size == 257
    with pytest.raises(UserError, match=r"data\.tokenizer: .*/vocab\.json is a part of a tokenizer; name its folder"):
        open_tokenizer(str(tmp_path / "vocab.json"))


def test_other_tokenizer_than_that_of_the_weights_is_refused(folder, tmp_path):
    write_tokenizer(folder)
    (tmp_path / "other").mkdir()
    write_tokenizer(tmp_path / "other", GPT2Tokenizer.train([CORPUS], 257 + 40))
    for name, key in (("train", "train.init_from"), ("evaluate", "checkpoint")):
        (fault,) = validate_command_line(
            name, [f"{key}='{folder}'", "data=stdlib", f"data.tokenizer='{tmp_path}/other'"]
        )
        assert (
            fault
            == f"data.tokenizer: {tmp_path}/other is not the tokenizer of {key}={folder}; leave it out to use its own"
        )
        assert not validate_command_line(name, [f"{key}='{folder}'", "data=stdlib", "data.tokenizer=bytes"])
        (problem,) = validate_command_line(name, [f"{key}='{folder}'", "data=stdlib", "data.vocab_size=300"])
        assert problem.startswith("data.vocab_size: is for a newly trained tokenizer")


def test_checkpoint_alone_suffices_for_generation(trained, tmp_path):
    elsewhere = Workspace(tmp_path)
    shutil.copy(trained.runs()[0] / "checkpoints" / run_folder.BEST, tmp_path / "model.pth")
    options = ["prompt=def f", "inference.seed=1"]
    here = trained.run("generate.py", *options).stdout
    assert elsewhere.run("generate.py", *options, "checkpoint=model.pth").stdout == here


def test_export_command(trained, tmp_path):
    done = trained.module_anew("gpt2.main", "export", f"to={tmp_path / 'a b' / 'out'}")
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "a b" / "out" / "model.safetensors", framework="pt") as file:
        assert "transformer.wte.weight" in file.keys()  # noqa: SIM118
    card = (tmp_path / "a b" / "out" / "README.md").read_text()
    assert "| data | corpus.txt |" in card
    again = trained.module("gpt2.main", "export", f"to={tmp_path}")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    missing = trained.module("gpt2.main", "export")
    assert (missing.returncode, missing.stderr) == (2, "error: to: the folder to write is missing, to=FOLDER\n")
