"""Command lines for which Hydra has no one-line error: each gives one here, and leaves nothing behind."""

import re

import pytest

from gpt2.cli import preflight
from gpt2.cli.compose import as_argument, compose, overrides_of, parsed
from gpt2.cli.hydra_private import parse_arguments
from gpt2.cli.preflight import check_flags, check_run, check_sweep, validate_command_line
from gpt2.config import TrainingConfig
from gpt2.errors import UserError
from gpt2.runtime.repository import CONF
from tests.conftest import TINY, Workspace


def problems(script: str, *arguments: str) -> list[str]:
    """The error lines of a command line, of which only the syntax is checked."""
    options = parse_arguments(list(arguments))
    with pytest.raises(UserError) as caught:
        check_flags(options)
        (check_sweep if options.multirun else check_run)(script, options)
    assert caught.value.exit_code == 2
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


PRESETS = ", ".join(sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
MODELS = "not one of gpt2, gpt2_large, gpt2_medium, gpt2_mini, gpt2_nano, gpt2_xl"


@pytest.mark.parametrize(
    ("script", "argument", "line"),
    [
        ("train", "wandb=false", "wandb=false: not one of auto, off, offline, online; wandb=off switches it off"),
        ("evaluate", "wandb=FALSE", "wandb=FALSE: not one of auto, off, offline, online; wandb=off switches it off"),
        ("generate", "wandb=null", "wandb=null: not one of auto, off, offline, online; wandb=off switches it off"),
        ("train", "wandb=true", "wandb=true: not one of auto, off, offline, online"),
        ("train", "wandb=[off]", "wandb=[off]: not one of auto, off, offline, online"),
        ("train", "model=null", f"model=null: {MODELS}"),
        ("benchmark_training", "model=1.5", f"model=1.5: {MODELS}"),
        ("benchmark_generation", "model=1e3", f"model=1e3: {MODELS}"),
        ("train", "model={a: 1}", "model: one key at a time, such as model.a=1"),
        ("train", "distributed={strategy: fsdp}", "distributed: one key at a time, such as distributed.strategy=fsdp"),
        ("train", "experiment=1", f"experiment=1: not one of {PRESETS}"),
        ("train", "learning_rate=1e-3", "there is no such group here. Did you mean: 'train.learning_rate'?"),
        ("train", "tokenizer=bytes", "there is no such group here. Did you mean: 'data.tokenizer'?"),
        ("export", "hydra/output=null", "hydra/output=null: not one of default, none, train"),
        ("train", "hydra/launcher=null", "hydra/launcher=null: not one of basic, joblib, submitit_local, "),
        ("train", "hydra/sweeper/sampler=1", "hydra/sweeper/sampler=1: not one of "),
        ("train", "hydra/sweeper/pruner=false", "none; hydra/sweeper/pruner=none switches it off"),
        ("train", "+learning_rate=64", "learning_rate=64: not one of "),
        ("train", "+model=gpt2_mini", "+model=gpt2_mini: the group is chosen already, leave out the +"),
    ],
)
def test_group_with_a_value_that_is_no_name(script, argument, line):
    found, *_ = problems(script, argument)  # without a checkpoint, some scripts report another problem too
    assert line in found


@pytest.mark.parametrize("flag", ["-m", "--cfg=job", "--info", "--hydra-help"])
def test_group_with_a_value_that_is_no_name_and_a_flag(flag):
    assert problems("train", "model=null", flag) == [f"model=null: {MODELS}"]


def test_group_swept_over_values_that_are_no_names():
    assert problems("train", "-m", "wandb=offline,false", "experiment=quickstart,2", "model=range(1,3)") == [
        "wandb=false: not one of auto, off, offline, online; wandb=off switches it off",
        f"experiment=2: not one of {PRESETS}",
        f"model=range(1,3): {MODELS}",
    ]


SWEEP = "is a sweep: add -m; if it is one value, a list needs brackets, a text with a comma quotes"


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["train.seed=1,2"], [f"train.seed=1,2 {SWEEP}"]),
        (["data=text", "data.files=a,b"], [f"data.files=a,b {SWEEP}"]),
        (["train.seed=range(1,3)"], [f"train.seed=range(1,3) {SWEEP}"]),
        (["train.seed=1,2", "--cfg", "job"], [f"train.seed=1,2 {SWEEP.replace('add -m', 'give one value')}"]),
        (["+train.learning_rate=1e-3"], ["+train.learning_rate=1e-3: the key exists already, leave out the +"]),
        (["data=text", "data.files=[a,"], ["data.files=[a,: not of the form key=value"]),
        (["train.lrr=1", "--info"], ["train.lrr=1: Key 'lrr' not in 'TrainingConfig'"]),
        (["train.lrr=1", "--hydra-help"], ["train.lrr=1: Key 'lrr' not in 'TrainingConfig'"]),
        (["--cfg", "job", "--info"], ["--cfg: not together with --info"]),
        (["-m", "-r"], ["-m: not together with -r"]),
        (["--resolve"], ["--resolve: only with --cfg"]),
        (["hydra.run.dir="], ["hydra.run.dir: is empty; name a folder"]),
        (["hydra.run.dir=${x}"], ["hydra.run.dir: Interpolation key 'x' not found"]),
        (["-m", "hydra.sweep.dir="], ["hydra.sweep.dir: is empty; name a folder"]),
        (["-m", "hydra.sweep.dir=${x}"], ["hydra.sweep.dir: Interpolation key 'x' not found"]),
        (["name=${nowhere}"], ["name: Interpolation key 'nowhere' not found"]),
        (["-m", "name=${nowhere}", "train.seed=1,2"], ["name: Interpolation key 'nowhere' not found"]),
        (["--cfg", "job", "name=${oc.env:NOBODY_SET_IT}"], ["name: KeyError"]),
        (["name=???"], ["name: ??? stands for a value that is missing"]),
        (["name=${hydra.run.dir}", "hydra.run.dir=x/${name}"], ["name: Interpolation key 'hydra.run.dir' not found"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir: relative paths start in the folder of the command"]),
        (["-m", "hydra.job.chdir=true"], ["hydra.job.chdir: relative paths"]),
        (["hydra.mode=MULTIRUN"], ["hydra.mode: -m makes several runs; leave it out"]),
        (["hydra.job.name=a/b"], ["hydra.job.name: 'a/b' is a path, a name is wanted"]),
        (["hydra.output_subdir=/proc/x"], ["hydra.output_subdir: '/proc/x' is a path, a name is wanted"]),
        (["-m", "tokenizer=a,b"], ["tokenizer=a,b: there is no such group here. Did you mean: 'data.tokenizer'?"]),
        (["hydra.verbose=1"], ["hydra.verbose: neither true nor names of loggers, [A,B]"]),
        (["hydra.runtime.choices.model=x"], ["hydra.runtime.choices.model=x: Hydra sets that"]),
        (["hydra.job.env_copy=[NOBODY_SET_IT]"], ["hydra.job.env_copy=[NOBODY_SET_IT]: KeyError: 'NOBODY_SET_IT'"]),
        (["data.files=[caf\udce9.txt]"], [r"data.files=[caf\xe9.txt]: is not UTF-8; rename the file, or match it"]),
        (["-m", "train.seed=1,\udcff"], [r"train.seed=1,\xff: is not UTF-8"]),
    ],
    ids=lambda value: " ".join(value).encode("utf-8", "backslashreplace").decode()[:40],
)
def test_error_line_of_each_mistake(arguments, lines):
    found = problems("train", "data=stdlib", *arguments)
    assert len(found) == len(lines), found
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("value", ["${x}", "${oc.env:NOBODY_SET_IT}", "${train.seed}", "${divide:1,0}", "${nope:1}"])
def test_interpolation_that_fails_is_named_by_its_key(workspace: Workspace, value):
    (line,) = workspace.run("train.py", *TINY, f"train.seed={value}", expect=2).stderr.splitlines()
    assert line.startswith("error: train.seed: ")


def test_overrides_are_recorded_as_typed():
    composed = compose("train", ["sample_prompt=${oc.env:HOME}"], with_hydra=True)
    assert overrides_of(composed.hydra) == ["sample_prompt=${oc.env:HOME}"]


def test_preset_that_is_no_yaml_or_has_a_group_value_that_is_no_name(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, content, expected in [
        ("no_yaml", "a: [", "ParserError"),
        ("no_word", "defaults:\n- override /wandb: off", "put the name into quotes"),
        ("a_list", "- 1", ""),
    ]:
        (tmp_path / "mine" / f"{name}.yaml").write_text(content)
        found = problems("train", f"hydra.searchpath=[file://{tmp_path}]", f"+mine={name}")
        assert re.search(expected, found[0]), found


@pytest.mark.parametrize("value", ["1", "1e3", "null", "true", "0x1f", "inf", "a b"])
def test_printed_text_is_read_as_text(value):
    assert parsed([as_argument("name", value).strip("'")])[0].value() == value


def test_mistakes_among_many_overrides_take_few_compositions(monkeypatch):
    composed = []
    monkeypatch.setattr(preflight, "compose", lambda *arguments: composed.append(0) or compose(*arguments))
    right = [f"{key}={value}" for key, value in vars(TrainingConfig()).items() if isinstance(value, float)]
    right = [f"train.{override}" for override in [*right, *right, *right]]
    assert len(right) > 25
    wrong = [*right[:9], "train.lr=1", *right[9:20], "model=gtp2", *right[20:]]
    first, second = validate_command_line("train", wrong)
    assert first.startswith("train.lr=1: Key 'lr' not in 'TrainingConfig'")
    assert second.startswith("model=gtp2: Could not find 'model/gtp2'")
    assert len(composed) < 10


def test_values_of_keys_are_checked_without_composing_the_defaults(monkeypatch):
    monkeypatch.setattr(preflight, "compose_defaults", lambda *_, **__: pytest.fail("composes the defaults"))
    arguments = ["loggers=[]", "plan=true", "train.max_steps=7", "model=gpt2_nano"]
    assert preflight.check_overrides("train", parse_arguments(arguments)) == (arguments, [], [])
