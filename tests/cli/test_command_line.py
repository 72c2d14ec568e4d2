"""Command lines: composition, validation, error messages, help."""

import re
import shlex
import subprocess
import sys
from random import Random
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from gpt2.cli.command import take_prompt
from gpt2.cli.complete import loggers_of_run, resolve
from gpt2.cli.compose import as_argument, compose, escaped, hydra_syntax, keys_of, leaves, title, to_yaml
from gpt2.cli.help import as_typed, help_text
from gpt2.cli.hydra_private import parse_arguments
from gpt2.cli.preflight import check_run, check_sweep, validate_command_line
from gpt2.config import SCHEMAS, GenerateRun, TrainRun
from gpt2.errors import UserError
from gpt2.runtime.repository import CONF
from gpt2.validation import validate
from tests.conftest import ROOT, Workspace

NASTY_PROMPTS = [
    "",
    " leading and trailing ",
    "a,b,c",
    "key=value",
    "prompt=again",
    "[1, 2, {a: b}]",
    "'single' \"double\" `back`",
    "${oc.env:HOME} $HOME $(id)",
    "back\\slash \\n \\",
    "line\nbreak\ttab",
    "emoji 🦜🧑‍🚀 漢字 é",
    "~x +y ++z -m --help",
    "null",
    "1e3",
    "{",
    "???",
    "%s %(a)s",
]


@pytest.mark.parametrize("prompt", NASTY_PROMPTS)
def test_prompt_bypasses_hydra_grammar(prompt):
    arguments = ["inference=greedy", f"prompt={prompt}", "-m"]
    assert take_prompt(arguments) == (["inference=greedy", "-m"], prompt)


def test_invalid_utf8_in_prompt_becomes_replacement_characters():
    from_the_shell = b"prompt=a\xffb".decode("utf-8", "surrogateescape")
    assert take_prompt([from_the_shell]) == ([], "a\ufffdb")
    assert take_prompt(["device=cpu"]) == (["device=cpu"], None)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["model", "train", "data", "inference", "wandb", "hparams_search"])
def test_every_choice_of_every_group_composes_and_validates(group, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for choice in choices(group):
        overrides = [f"{group}={choice}", *([f"data.files=[{tmp_path}/a.txt]"] if choice in ("text", "tokens") else [])]
        config = resolve("train", compose("train", overrides), overrides)
        assert isinstance(config, TrainRun)
        assert validate(config) == []


def test_default_run_equals_dataclass_defaults():
    config = resolve("train", compose("train", []), [])
    assert config == TrainRun()
    assert (config.data.dataset_name, config.data.dataset_config) == ("wikitext", "wikitext-2-raw-v1")


def test_group_files_contain_only_fields():
    for group in ("model", "train", "data", "inference", "wandb"):
        fields = getattr(TrainRun(), group)
        for choice in choices(group):
            plain = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"), resolve=False)
            assert set(plain) <= set(vars(fields)), f"{group}/{choice}"


PROBLEMS = [
    (["train.lrr=1"], ["Key 'lrr' not in 'TrainingConfig'. Did you mean one of: 'train.learning_rate', "]),
    (["train.lr=1"], ["train.lr=1: Key 'lr' not in 'TrainingConfig'. Did you mean: 'train.learning_rate'?"]),
    (["lr=1"], ["Key 'lr' not in 'TrainRun'. Did you mean: 'train.learning_rate'?"]),
    (["++train.lr=1"], ["Key 'lr' not in 'TrainingConfig'. Did you mean: 'train.learning_rate'?"]),
    (["model.n_embd=64"], ["Key 'n_embd' not in 'GPT2Config'. Did you mean: 'model.d_model'?"]),  # nanoGPT's name
    (["+batch_size=4"], ["batch_size: Key 'batch_size' not in 'TrainRun'. Did you mean: 'train.batch_size'?"]),
    (["++nothing=4"], ["nothing: Key 'nothing' not in 'TrainRun'; --help lists the keys"]),
    (["block_size=64"], ["Key 'block_size' not in 'TrainRun'. Did you mean: 'model.context_length'?"]),
    (["train.max_iters=9"], ["Key 'max_iters' not in 'TrainingConfig'. Did you mean: 'train.max_steps'?"]),
    (
        ["modle=gpt2_mini"],
        ["Key 'modle' not in 'TrainRun'. Did you mean one of: 'wandb.mode', 'model', 'model.d_model'?"],
    ),
    (["n_trials=3"], ["Key 'n_trials' not in 'TrainRun'. Did you mean: 'hydra.sweeper.n_trials'?"]),
    (["dataset=openwebtext"], ["Key 'dataset' not in 'TrainRun'. Did you mean: 'data'?"]),
    (["out_dir=x"], ["Key 'out_dir' not in 'TrainRun'. Did you mean: 'hydra.run.dir'?"]),  # nanoGPT's name
    (["train.warmup=1"], ["Key 'warmup' not in 'TrainingConfig'. Did you mean: 'train.warmup_steps'?"]),
    (["model.n_layers=1"], ["Key 'n_layers' not in 'GPT2Config'. Did you mean: 'model.num_layers'?"]),
    (["train.warmup_step=1"], ["Did you mean: 'train.warmup_steps'?"]),
    (["data.batch_size=1"], ["Key 'batch_size' not in 'DataConfig'. Did you mean: 'train.batch_size'?"]),
    (["temp=1"], ["Key 'temp' not in 'TrainRun'. Did you mean: 'inference.temperature'?"]),
    (["train.qqq=1"], ["Key 'qqq' not in 'TrainingConfig'; --help lists the keys"]),
    (["tarin.seed=1"], ["Key 'tarin' not in 'TrainRun'. Did you mean: 'train'?"]),
    (["max_steps=9"], ["max_steps=9: Key 'max_steps' not in 'TrainRun'. Did you mean: 'train.max_steps'?"]),
    (["device=cpu"], ["Key 'device' not in 'TrainRun'. Did you mean: 'train.device'?"]),
    (["precision=fp32"], ["Did you mean one of: 'train.precision', 'inference.precision'?"]),
    (["+train.new=1"], ["Key 'new' not in 'TrainingConfig'"]),
    (["model=gtp2"], ["Could not find 'model/gtp2'. Available options in 'model': gpt2, "]),
    (
        ["+learning_rate=width_65"],
        ["Available options in 'learning_rate': width_128, width_256, width_32, width_64"],
    ),
    (["experiment=nope"], ["Available options in 'experiment': debug, "]),
    (["train.batch_size=abc"], ["Value 'abc' of type 'str' could not be converted to Integer"]),
    (["train.seed=1.5"], ["Value '1.5' of type 'float' could not be converted to Integer"]),
    (["train.learning_rate=null"], ["field 'train.learning_rate' is not Optional"]),
    (["train.precision=fp8"], ["expected one of ['auto', 'fp32', 'bf16', 'fp16']"]),
    (["wandb.mode=maybe"], ["expected one of ['auto', 'online', 'offline', 'off']"]),
    (["model.num_heads=7"], ["model.num_heads: 7 heads do not divide model.d_model=768, 6 would"]),
    (["data.max_length=2048"], ["data.max_length: blocks of 2048 tokens do not fit into model.context_length=1024"]),
    (["data.validation_files=[]"], ["data.validation_files: the list is empty"]),
    (["data=text"], ["data.files: the list is empty"]),
    (["data=text", "data.files=[nowhere.txt]"], ["data.files: no file matches 'nowhere.txt'"]),
    (["data.tokenizer=nowhere"], ["data.tokenizer: 'nowhere' is neither gpt2, bytes nor train"]),
    (["name=../up"], ["name: '../up' must be letters"]),
    (["train.device=gpu"], ["train.device: 'gpu' is none of auto, cuda, cuda:N, mps, cpu"]),
    (["train.precision=bf16", "train.mixed_precision=false"], ["contradicts train.mixed_precision=false"]),
    (["resume=nowhere"], ["resume: nowhere is no run folder"]),
    (
        ["train.lrr=1", "model=gtp2", "train.batch_size=abc", "model.num_heads=7", "train.warmup_steps=-1"],
        ["train.lrr=1: ", "model=gtp2: ", "train.batch_size=abc: ", "model.num_heads: ", "train.warmup_steps: "],
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), PROBLEMS, ids=lambda value: " ".join(value)[:40])
def test_all_problems_are_reported_in_one_line_each(overrides, expected):
    found = validate_command_line("train", overrides)
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line
        assert "\n" not in line


def test_inference_problems_with_a_checkpoint(trained: Workspace):
    checkpoint = next(trained.folder.glob("outputs/runs/*/*/checkpoints/last.pth"))
    overrides = [f"checkpoint='{checkpoint}'", "inference.temperature=-1", "inference.top_p=2"]
    found = validate_command_line("generate", overrides)
    assert [line.split(":")[0] for line in found] == ["inference.temperature", "inference.top_p"]


def test_sampling_options_come_from_the_checkpoint_unless_overridden(trained: Workspace):
    checkpoint = next(trained.folder.glob("outputs/runs/*/*/checkpoints/last.pth"))

    def inference(*overrides):
        line = [f"checkpoint='{checkpoint}'", *overrides]
        config = resolve("generate", compose("generate", line), line)
        assert isinstance(config, GenerateRun)
        return config.inference

    assert inference().max_new_tokens == 12  # the value of the run
    assert inference("inference.top_k=7").max_new_tokens == 12
    assert inference("inference.top_k=7").top_k == 7
    assert inference("inference=greedy").max_new_tokens == 100  # a group replaces all values of the run
    assert inference(r"inference.stop=['a\n','b ']").stop == ["a\n", "b "]


@pytest.mark.parametrize(
    ("run", "line", "loggers"),
    [
        ({"loggers": ["wandb"]}, [], ["wandb"]),
        ({"loggers": ["tensorboard"]}, [], []),
        ({"wandb": {"mode": "off"}}, [], []),
        ({"wandb": {"mode": "off"}}, ["wandb=offline"], ["wandb"]),
        ({"loggers": []}, ["loggers=[mlflow]"], ["mlflow"]),
        (None, [], ["wandb"]),
    ],
)
def test_evaluation_is_logged_where_its_run_was(run, line, loggers):
    saved = run and {"loggers": ["wandb"], "wandb": {"mode": "auto"}, **run}
    composed = compose("evaluate", line)
    values = loggers_of_run(SimpleNamespace(run=saved), composed, keys_of(line))
    assert values.get("loggers", list(composed.loggers)) == loggers


# The scripts themselves


def check(name: str, *arguments: str) -> None:
    """Check a command line as its script does."""
    options = parse_arguments(list(arguments))
    if options.multirun:
        check_sweep(name, options)
    else:
        resolve(name, check_run(name, options), options.overrides)


def refuse(workspace: Workspace, *arguments: str, script: str = "train.py") -> list[str]:
    done = workspace.run(script, *arguments, expect=2)
    assert not (workspace.folder / "outputs").exists()
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_mistakes_are_reported_before_an_output_folder_exists(workspace):
    lines = refuse(workspace, "train.lrr=1", "model.num_heads=7", "word", "~train", "model=gtp2")
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)


def test_sweep_is_validated_before_its_first_run(workspace):
    lines = refuse(workspace, "-m", "train.learning_rate=1e-3,-1", "model=gpt2,gtp2", "data=stdlib")
    assert sorted(line.split(":")[1].strip() for line in lines) == ["model=gtp2", "train.learning_rate"]


def test_sweep_is_validated_in_combinations():
    sweep = ["model.d_model=100,200", "model.num_heads=10,20", "model.d_ff=400"]
    check("train", "-m", *sweep)
    with pytest.raises(UserError, match="num_heads: 16 heads"):
        check("train", "-m", sweep[0], "model.num_heads=16")


@pytest.mark.usefixtures("in_trained")
@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("generate", ["-m", "inference.seed=1,2"], "-m: only train.py makes several runs"),
        ("train", ["-m", "resume=latest"], "one run at a time"),
        ("train", ["hparams_search=optuna"], "hparams_search=optuna: a search has many runs, so it needs -m"),
        ("benchmark_generation", ["model=gpt2_nano"], "new_tokens: .* 192 do not fit into model.context_length=64"),
        ("benchmark_generation", ["batch_sizes=[]"], "batch_sizes: "),
        ("benchmark_training", ["precisions=[fp8]"], "expected one of"),
        ("train", ["inference.quantization=int8"], "inference.quantization: only for generate.py"),
        ("generate", ["batch_size=0"], "batch_size: 0 is not a whole number of at least 1"),
        ("generate", ["inference.quantization=int3"], r"expected one of \['int8', 'int4'\]"),
        ("generate", ["inference.quantization=int8", "inference.precision=bf16"], "contradicts inference.quantization"),
        ("evaluate", ["quantization=int8", "precision=bf16"], "precision: bf16 contradicts quantization=int8"),
        ("train", ["--config-name", "other"], "a preset goes to conf/experiment"),
    ],
)
def test_invalid_command_lines_of_each_script(script, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        check(script, *arguments)


@pytest.fixture
def in_trained(trained: Workspace, monkeypatch) -> None:
    monkeypatch.chdir(trained.folder)


@pytest.mark.parametrize(
    "value", ["outputs/runs/a/1", "it's (2), x=y", 'C:\\odd "name"', "${HOME}", "\\${a} \\\\${", "${oc.env:HOME}\\"]
)
def test_printed_arguments_are_quoted_for_shell_and_hydra(value):
    (argument,) = shlex.split(as_argument("resume", value))
    assert compose("train", [argument]).resume == value


def test_texts_of_files_are_read_back_unchanged():
    random = Random(1)
    texts = ["".join(random.choices("$$${{{}\\\\\\a:.'\" \n", k=random.randint(1, 12))) for _ in range(500)]
    nested = {"texts": [*texts, "${oc.env:HOME}", "1e-3", "null", "2 # x"], "inner": {"text": "${x}"}, "number": 1.5}
    assert OmegaConf.to_container(OmegaConf.create(escaped(nested)), resolve=True) == nested
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(nested)), resolve=True) == nested


def test_generate_without_a_checkpoint_names_the_quickstart(workspace):
    (line,) = refuse(workspace, "prompt=x", script="generate.py")
    assert "python train.py experiment=quickstart" in line


def test_without_network_the_error_names_offline_alternatives(workspace):
    done = workspace.run("train.py", "wandb=off", expect=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "could not reach dataset 'wikitext'" in line
    assert all(choice in line for choice in ("experiment=quickstart", "data=text", "local folders"))
    assert workspace.runs() == []


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "generate.py"])
def test_help_needs_neither_torch_nor_hydra(script):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / script, "--help"], capture_output=True, text=True, check=True
    )
    assert "Keys (KEY=VALUE):" in done.stdout
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "gpt2.config" in imported  # the pattern matches imports
    slow = {"torch", "hydra", "omegaconf", "transformers", "datasets", "wandb", "numpy", "optuna", "joblib", "submitit"}
    assert not imported & slow


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_shows_every_key_with_its_default_and_comment(name):
    text = help_text(name)
    composed = leaves(compose(name, []))
    for key in composed:
        is_set_by_us = key.split(".")[0] in ("started_with", "choices", "study", "others")
        assert (f"  {key}=" in text) != is_set_by_us, key
    for group in ("model", "data", "inference"):
        assert (f"  {group}={'|'.join(choices(group))}" in text) == (group in composed_groups(name))
    assert "  model.num_heads=12                        attention heads of a block\n" in text or "model" not in composed
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", SCHEMAS)
def test_defaults_in_help_are_what_a_command_line_would_set(name):
    """`as_typed` quotes without Hydra exactly the values that `hydra_syntax` quotes with Hydra's grammar."""
    for key, default in leaves(OmegaConf.structured(SCHEMAS[name]), resolve=False).items():
        if not isinstance(default, dict):
            assert as_typed(default) == hydra_syntax(default), key


def composed_groups(name: str) -> set[str]:
    """The groups of `conf/` in a script's defaults list."""
    return {group for entry in OmegaConf.load(CONF / f"{name}.yaml").defaults for group in entry if entry != group}


def test_multirun_with_cfg_is_rejected(workspace):
    (line,) = refuse(workspace, "-m", "train.beta2=0.9,0.95", "--cfg", "job")
    assert line.startswith("error: -m: not together with --cfg")


def test_module_runs_the_same_scripts(workspace):
    assert workspace.module_anew("gpt2.main", "train", "--help").stdout.startswith("Train GPT-2")
    refused = workspace.module("gpt2.main", "train", "train.lrr=1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    unknown = workspace.module("gpt2.main", "dance")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: there is no command dance\n")
    assert "export" in workspace.module("gpt2.main", "--help").stdout
    help_of_optimize = workspace.module("gpt2.main", "optimize", "--help").stdout
    assert help_of_optimize.startswith("Search hyperparameters")
    assert "    n_trials: 50 # total number, over all processes\n" in help_of_optimize
    assert "      train.beta2: interval(0.9, 0.999)\n" in help_of_optimize


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], ""),
        (["model=gpt2_medium", "train.learning_rate=3e-4", "train.seed=2"], "gpt2_medium learning_rate=3e-4 seed=2"),
        (["experiment=quickstart", "wandb=off", "train.device=cpu", "hydra.run.dir=x"], "quickstart"),
        (["+learning_rate=width_64"], "width_64"),
        ([f"data.files=[{'x' * 60}]"], "files=…"),
        (["train.seed=1", "train.seed=2"], "seed=2"),
        (["train.learning_rate=0.00123869525906173", "train.beta2=0.95"], "learning_rate=0.001239 beta2=0.95"),
        (
            [f"train.{key}={'1' * 39}" for key in ("seed", "max_steps", "warmup_steps")],
            f"seed={'1' * 39} max_steps={'1' * 39} warm…",
        ),
    ],
)
def test_title_of_a_run(overrides, named):
    assert title(overrides) == named
