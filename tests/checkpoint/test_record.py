"""Records with right checksums and wrong values, and the settings that a record may decide."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.pretrained import export, open_model
from gpt2.cli.complete import LOADING_KEYS, resolve, saved_values
from gpt2.cli.compose import compose
from gpt2.cli.preflight import validate_command_line
from gpt2.config import USER_KEYS, DataConfig, GPT2Config, TrainingConfig, TrainRun
from gpt2.data_loader import get_dataloaders, load_text_data
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.train import Trainer
from tests.conftest import Workspace
from tests.helpers import rewrite_record, with_value


@pytest.fixture(scope="module")
def workspace(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("downloads")
    shutil.copy(trained.folder / "corpus.txt", folder)
    return Workspace(folder)


@pytest.fixture
def run(trained: Workspace, workspace: Workspace, monkeypatch) -> Path:
    """A copy of a run with one checkpoint, for changes. Its path never changes, so that command lines compose once."""
    monkeypatch.chdir(workspace.folder)
    shutil.rmtree("downloaded", ignore_errors=True)
    shutil.copytree(trained.runs()[0], "downloaded", ignore=shutil.ignore_patterns("step_*", "last.pth"))
    return Path("downloaded")


TEXT = ["data=text", "data.files=[corpus.txt]"]


def problems_of_each_script(run: Path) -> dict[str, list[str]]:
    """The errors of generate, evaluate, fine-tuning, resuming and export about the checkpoint of a run."""
    problems = {
        "generate": validate_command_line("generate", ["checkpoint=downloaded"]),
        "evaluate": validate_command_line("evaluate", ["checkpoint=downloaded"]),
        "fine-tune": validate_command_line("train", ["train.init_from=downloaded", *TEXT]),
        "resume": validate_command_line("train", ["resume=downloaded"]),
    }
    try:
        export(open_model(str(run)), run / "exported")
    except UserError as error:
        problems["export"] = error.problems
    return problems


WRONG = [
    *(("progress.step", value) for value in ("x", -1, 1.5, True, None, 2**64)),
    *(("progress.val_loss", value) for value in ("x", float("nan"), float("inf"), [1.0])),
    *(("progress", value) for value in (None, 5, [1], "x", ...)),
    *(("run", value) for value in (5, [1], "x", ...)),
    *(("run.inference", value) for value in (None, [1], "x", ...)),
    *(("run.data.files", value) for value in ("x", [1], {"a": 1}, 5)),
    *(("run.started_with", value) for value in ("x", [1], None)),
    *(("run.choices", value) for value in ("x", [1], {"a": 1})),
    *(("model.num_layers", value) for value in ("1", None, 10**4, 10**400)),
    *(("model", value) for value in (None, [], ...)),
    *(("train", value) for value in (None, [1], ...)),
    *(("tokenizer", value) for value in (5, [1], {"a": 1}, ...)),
    *(("machine", value) for value in ("x", [1], {"linear": []})),
    ("run.inference.stop", "x"),
    ("run.inference.top_k", 1.5),
    ("run.data", ...),
    ("run.train.batch_size", "4"),
    ("run.train.precision", "fp8"),
    ("run.wandb", 3),
    ("run.loggers", ["wandb", "theirs"]),
    ("run.mlflow", None),
    ("train.learning_rate", [1]),
    ("train.learning_rate", 10**400),
    ("versions", None),
    ("scaler", [1]),
    ("steps_left_out", {"total": "x"}),
    ("wandb_id", 5),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: repr(value)[:20])
def test_value_of_wrong_type_is_refused_by_every_script(run, key, value):
    best = run / "checkpoints" / "best_model.pth"
    rewrite_record(best, lambda record: with_value(record, key, value))
    for script, problems in problems_of_each_script(run).items():
        (line,) = problems
        assert f"was not written by Trainer: {key}" in line, script
        assert str(best) in line
        assert len(line) < 1500
        assert "\n" not in line


def test_keys_of_another_version_are_named(run):
    best = run / "checkpoints" / "best_model.pth"
    rewrite_record(best, lambda record: with_value(with_value(record, "run.train.unheard_of", 1), "run.a:b", 1))
    for script, (line,) in problems_of_each_script(run).items():
        problem = "is from another version of this program: this one has no run.'a:b', run.train.unheard_of"
        assert line.endswith(f"{best} {problem}"), script


def test_numbers_in_texts_and_whole_numbers_are_numbers(run):
    best = run / "checkpoints" / "best_model.pth"
    rewrite_record(best, lambda record: with_value(with_value(record, "train.beta1", "0.5"), "progress.seconds", 3))
    record = open_model(str(run)).record
    assert (record["train"]["beta1"], record["progress"]["seconds"]) == (0.5, 3.0)


@pytest.mark.parametrize("text", ["", "{", "5", "[1]", '"x"', "{}", '{"vocabulary": 5, "merges": []}', "[" * 10**5])
def test_wrong_tokenizer_is_refused(run, text):
    rewrite_record(run / "checkpoints" / "best_model.pth", lambda record: {**record, "tokenizer": text})
    problems = problems_of_each_script(run)
    assert not problems.pop("generate")  # it reads the tokenizer together with the weights
    assert problems.keys() == {"evaluate", "fine-tune", "resume", "export"}
    for script, (line,) in problems.items():
        assert "best_model.pth: tokenizer: not one that was saved by this program" in line, script
    with pytest.raises(UserError, match="tokenizer: not one that was saved"):
        open_model(str(run)).tokenizer_for_text()


def test_tokenizer_with_wrong_entries_is_refused():
    good = json.loads(GPT2Tokenizer.of_bytes().to_json())
    bad = [{"merges": [["a"]]}, {"merges": [[1, 2]]}, {"merges": 5}, {"vocabulary": {"a": "b"}}, {"vocabulary": None}]
    for change in bad:
        with pytest.raises(UserError, match=r"^tokenizer: "):
            GPT2Tokenizer.from_json(json.dumps({**good, **change}))


def test_weights_that_are_not_finite_are_refused(run):
    best, name = run / "checkpoints" / "best_model.pth", "model/blocks.0.attention.qkv.weight"
    for number in (float("nan"), float("inf")):
        tensor = checkpoint.read_tensors(best)[name]
        tensor[3, 1] = number
        rewrite_record(best, lambda record: record, {name: tensor})
        with pytest.raises(UserError, match=r"NaN or infinity among the weights, in blocks.0.attention.qkv.weight$"):
            open_model(str(run)).build()


NAN = torch.full((32,), torch.nan)


@pytest.mark.parametrize(
    ("change", "tensors", "complaint"),
    [
        (lambda record: with_value(record, "random", ...), {}, "'random'"),
        (lambda record: with_value(record, "random.python", [3, [1], None]), {}, "state vector"),
        (lambda record: with_value(record, "steps_left_out", {}), {}, "'total'"),
        (lambda record: with_value(record, "progress.position", 10**6), {}, "progress.position: an epoch has "),
        (lambda record: record, {"random/cpu": torch.zeros(3, dtype=torch.uint8)}, "RNG state"),
        (
            lambda record: record,
            {"model/final_norm.bias": torch.zeros(3)},
            r"final_norm.bias \(3,\) instead",
        ),
        (
            lambda record: record,
            {"optimizer/exp_avg/final_norm.bias": torch.zeros(3)},
            "exp_avg/final_norm.bias",
        ),
        (lambda record: record, {"model/final_norm.bias": NAN}, "NaN or infinity .* in model/final_norm.bias$"),
        (lambda record: record, {"optimizer/exp_avg/final_norm.bias": NAN}, "in optimizer/exp_avg/final_norm.bias$"),
        (lambda record: record, {"optimizer/exp_avg/nothing": torch.zeros(3)}, "exp_avg/nothing"),
        (lambda record: record, {"optimizer/z/final_norm.bias": torch.zeros(1)}, "z/final_norm.bias"),
        (
            lambda record: record,
            {"optimizer/row_var/token_embedding.weight": torch.zeros(1, 1)},
            r"row_var/token_embedding.weight \(1, 1\) instead of \(\d+, 1\)",
        ),
        (lambda record: record, {"optimizer/new/nothing": torch.zeros(3)}, "'nothing'"),
    ],
)
def test_state_that_does_not_fit_is_refused(run, change, tensors, complaint):
    best = run / "checkpoints" / "best_model.pth"
    rewrite_record(best, change, tensors)
    with pytest.raises(UserError, match=complaint) as refused:
        trainer_of(best).load_checkpoint(str(best))
    assert str(best) in str(refused.value)


def test_unknown_implementations_are_chosen_again(run):
    best, machine = run / "checkpoints" / "best_model.pth", {"device": "cpu", "precision": "x", "linear": "y"}
    rewrite_record(best, lambda record: {**record, "machine": machine})
    trainer = trainer_of(best, precision="auto")
    trainer.load_checkpoint(str(best))
    assert trainer.plan.precision.name in ("fp32", "bf16")


def trainer_of(path: Path, **settings: str) -> Trainer:
    """A Trainer with the model, the data and the settings of a checkpoint, some of them changed."""
    record = checkpoint.read_record(path)
    train = TrainingConfig(**{**record["train"], **settings})
    *sets, _ = load_text_data(DataConfig(**{**record["run"]["data"], "cache_dir": "cache"}))
    train_loader, val_loader, _ = get_dataloaders(*sets, train)
    return Trainer(GPT2Model(GPT2Config(**record["model"])), train_loader, val_loader, train, "new")


# ---------------------------------------------------------------------------------------------------------------------
# Settings that a record may decide

ACCOUNTS_AND_PLACES = {
    "wandb": {"mode": "online", "project": "theirs", "entity": "theirs", "log_checkpoints": "best"},
    "mlflow": {"tracking_uri": "https://theirs", "experiment": "theirs"},
    "data": {"cache_dir": "theirs", "preprocessing_num_workers": 7},
    "train": {"device": "mps", "num_workers": 7},
}


def test_settings_that_a_checkpoint_decides():
    """Each new key must be listed here, after deciding whether an untrusted file may set it."""
    everything = {
        f"{group}.{key}" if isinstance(inner, dict) and group != "choices" else group
        for group, inner in asdict(TrainRun()).items()
        for key in (inner if isinstance(inner, dict) and inner else [None])
    }
    decided = saved_values(asdict(TrainRun())).keys()
    assert everything - decided == {
        *USER_KEYS,
        *LOADING_KEYS,
        "plan",
        "resume",
        "resume_changes",
        "study.name",
        "study.trial",
        "study.claim",
    }
    assert decided <= everything


def test_a_run_from_before_a_default_of_generation_changed_is_resumed(run):
    best = run / "checkpoints" / "best_model.pth"
    rewrite_record(best, lambda record: with_value(record, "run.inference.precision", "fp32"))
    line = [f"resume={run}"]
    assert resolve("train", compose("train", line), line).inference.precision == "auto"


def test_no_account_folder_or_device_comes_from_a_checkpoint(run, caplog):
    caplog.set_level(logging.INFO, "gpt2")

    def theirs(record: dict) -> dict:
        for group, values in ACCOUNTS_AND_PLACES.items():
            record["run"][group] |= values
        return record

    rewrite_record(run / "checkpoints" / "best_model.pth", theirs)
    lines = {"generate": [f"checkpoint={run}"], "evaluate": [f"checkpoint={run}"], "train": [f"resume={run}"]}
    for name, line in lines.items():
        assert "theirs" not in str(resolved := resolve(name, compose(name, line), line))
        assert not {"mps", 7} & {*str(resolved).replace("=", " ").replace(",", " ").split()}
    assert (resolved.wandb.mode, resolved.train.device, resolved.train.num_workers) == ("auto", "auto", 4)
    assert "not taken from the checkpoint: wandb.mode, wandb.project, wandb.entity" in caplog.text
    mine = [*lines["train"], "wandb.project=mine", "train.device=cpu", "wandb=offline"]
    resolved = resolve("train", compose("train", mine), mine)
    assert (resolved.wandb.project, resolved.train.device, resolved.wandb.mode) == ("mine", "cpu", "offline")


@pytest.mark.parametrize("mode", ["off", "offline"])
def test_checkpoint_may_keep_wandb_from_being_contacted(run, mode):
    best = run / "checkpoints" / "best_model.pth"
    rewrite_record(best, lambda record: with_value(record, "run.wandb.mode", mode))
    line = [f"resume={run}"]
    assert resolve("train", compose("train", line), line).wandb.mode == mode
    line.append("wandb=online")
    assert resolve("train", compose("train", line), line).wandb.mode == "online"


def test_resumed_run_keeps_its_loggers(run):
    best, line = run / "checkpoints" / "best_model.pth", [f"resume={run}"]
    for loggers in ([], ["tensorboard", "csv"]):
        rewrite_record(best, lambda record, loggers=loggers: with_value(record, "run.loggers", loggers))
        assert resolve("train", compose("train", line), line).loggers == loggers
    others = [*line, "loggers=[mlflow]"]
    assert resolve("train", compose("train", others), others).loggers == ["mlflow"]
    rewrite_record(best, lambda record: with_value(with_value(record, "run.loggers", ...), "run.mlflow", ...))
    assert resolve("train", compose("train", line), line).loggers == ["wandb"]  # of a version without loggers


def test_run_folder_with_links_to_other_files_is_not_written_to(run, workspace):
    """For example, opening a lock that is a link would empty its target."""
    kept, links = workspace.folder / "kept", [".evaluation.json.lock", ".lock", "metrics.jsonl", "wandb_id"]
    kept.write_text((run / "metrics.jsonl").read_text())
    before = kept.read_bytes()
    for name in links:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to("../kept")
    for script, argument, key in (("train.py", "resume", "resume"), ("evaluate.py", "checkpoint", "output")):
        (line,) = workspace.run(script, f"{argument}={run}", "wandb=off", expect=2).stderr.splitlines()
        assert line.startswith(f"error: {key}: files in ")
        assert line.endswith(f"are symbolic links: {', '.join(links[:3])} and 1 more; replace them by files")
    assert kept.read_bytes() == before


SECRET = "canary-5d1f"
LURE = "${oc.env:MY_SECRET} ${HOME} ${train.seed} \\${x} ${"


def test_interpolations_in_a_checkpoint_are_text(run, workspace, monkeypatch):
    """The scripts read a checkpoint that has an interpolation in each text that they print, log or store."""

    def lure(record: dict) -> dict:
        record["run"] |= {"sample_prompt": LURE, "started_with": [LURE], "choices": {"model": LURE}}
        record["run"]["data"] |= {"text_column": LURE, "dataset_name": LURE}
        record["run"]["inference"]["stop"] = [LURE]
        record["train"]["init_from"] = LURE
        return record

    rewrite_record(run / "checkpoints" / "best_model.pth", lure)
    monkeypatch.setitem(workspace.environment, "MY_SECRET", SECRET)
    assert workspace.module("gpt2.main", "export", f"checkpoint={run}", "to=exported").returncode == 0
    workspace.run("evaluate.py", f"checkpoint={run}", "output=evaluation.json")
    workspace.run("generate.py", f"checkpoint={run}", "prompt=x")
    workspace.run("train.py", f"resume={run}", "train.max_steps=12", "wandb=offline")
    shutil.copytree(run, Path("outputs/runs/gpt2/${oc.env:MY_SECRET}"))
    refused = workspace.run("train.py", "resume=latest", "wandb=off", expect=2)
    assert "outputs/runs/gpt2/${oc.env:MY_SECRET}: Hydra would interpolate ${ in its name" in refused.stderr
    written = {path: path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file()}
    assert not [str(path) for path, content in written.items() if SECRET.encode() in content]
    assert LURE in (run / "samples.md").read_text()
    result = json.loads((workspace.folder / "evaluation.json").read_text())
    assert result["data"]["text_column"] == LURE
    assert LURE in (workspace.folder / "exported" / "README.md").read_text()
    assert open_model(str(run)).run["sample_prompt"] == LURE
    assert (run / "checkpoints" / "step_00000012.pth").is_file()
