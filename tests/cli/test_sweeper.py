"""Studies from the command line: `train.py -m` with runs of one second, and the files that it writes."""

import csv
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose
from gpt2.cli.hydra_private import parse_arguments
from gpt2.cli.preflight import check_run, check_sweep, with_values
from gpt2.cli.schema import steps_of_compute
from gpt2.cli.search_space import distributions, study_settings, study_sweeper
from gpt2.config import OptunaConfig
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.runtime.repository import CONF
from gpt2.search.algorithms import PRUNERS, SAMPLERS
from tests.conftest import ROOT, TINY, Workspace
from tests.test_scripts import wait_for
from tests.wandb_file import read_wandb

TRIAL = [argument for argument in TINY if not argument.startswith("train.warmup_steps=")]  # which is searched
STUDY = ["-m", "hparams_search=optuna", "hydra.sweeper.study_name=mine", *TRIAL, "train.eval_every=2"]
PRUNING = ["hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1"]
PRUNING += ["hydra.sweeper.pruner.n_warmup_steps=0", "hydra.sweeper.n_trials=4"]
PRUNING += ["hydra.sweeper.sampler.seed=23"]  # with this seed trial 2 is pruned
STORAGE = "sqlite:///separate-storage.db"


def study_in(folder: Path, name: str = "mine", storage: str | None = None) -> optuna.Study:
    storage = storage or f"sqlite:///{folder}/outputs/sweeps/{name}/study.db"
    return optuna.load_study(study_name=name, storage=storage)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with one finished study, for tests that do not change it."""
    from tests.conftest import TEXT

    folder = tmp_path_factory.mktemp("studied")
    (folder / "corpus.txt").write_text(TEXT)
    workspace = Workspace(folder)
    workspace.command_line = [*STUDY, *PRUNING, "wandb=offline", f"hydra.sweeper.storage='{STORAGE}'"]
    workspace.command_line.append(r"sample_prompt='\${HOME} x'")  # the text ${HOME} x
    workspace.output = workspace.run("train.py", *workspace.command_line).stdout
    workspace.study = study_in(folder, storage=STORAGE.replace("///", f"///{folder}/"))
    workspace.sweep = folder / "outputs" / "sweeps" / "mine"
    return workspace


def test_trials_are_complete_or_pruned_early(studied):
    trials = studied.study.trials
    assert [trial.number for trial in trials] == list(range(4))
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert pruned
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials)
    for trial in trials:
        evaluations = len(trial.intermediate_values)
        assert list(trial.intermediate_values) == list(range(evaluations))
        assert 1 <= evaluations <= 3 if trial in pruned else evaluations == 4
        spent = trial.user_attrs["spent"]
        assert spent["steps"] == 2 * evaluations
        if trial in pruned:
            assert spent["tokens_saved"] == spent["tokens"] // spent["steps"] * (8 - spent["steps"])
            assert trial.user_attrs["reason"] == f"behind other trials at step {2 * evaluations}"
        else:
            assert trial.value == min(trial.intermediate_values.values())


def test_parameters_reach_the_runs(studied):
    best = studied.study.best_trial
    record = checkpoint.read_record(run_folder.find_checkpoint(str(studied.sweep / str(best.number))))
    for key, value in best.params.items():
        group, _, name = key.partition(".")
        if key != "train.batch_size":  # fixed on the command line
            assert record[group][name] == value
    assert record["model"]["attention_dropout"] == record["model"]["residual_dropout"] == best.params["model.dropout"]
    assert (record["run"]["study"]["name"], record["run"]["study"]["trial"]) == ("mine", best.number)
    assert "train.batch_size" not in best.params


def test_study_writes_a_report_and_keeps_the_best_checkpoints(studied):
    names = {path.name for path in studied.sweep.iterdir()}
    files = {"study.md", "study.log", "trials.csv", "best.yaml", "history.png", "evaluations.png", "slices.png"}
    assert files | {str(number) for number in range(4)} == names - {"importances.png"}
    best = studied.study.best_trial.number
    assert [path.parent.name for path in studied.sweep.glob("*/checkpoints")] == [str(best)]
    assert all((studied.sweep / str(number) / "train.log").stat().st_size for number in range(4))
    with (studied.sweep / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [trial.value for trial in studied.study.trials]
    report = (studied.sweep / "study.md").read_text()
    assert f"The best is trial {best}, {studied.study.best_value:.4f}" in report
    assert "pruning saved" in report


def test_each_trial_prints_one_line(studied):
    lines = [line for line in studied.output.splitlines() if line.startswith("trial ")]
    assert [int(line.split()[1]) for line in lines] == list(range(4))
    for line, trial in zip(lines, studied.study.trials, strict=True):
        assert f"{trial.state.name.lower()} " in line
        assert f" {trial.value:.4f}  " in line
        assert ("(behind other trials at step " in line) == (trial.state.name == "PRUNED")
        assert f"learning_rate={trial.params['train.learning_rate']:.3g}" in line
    assert all(" left" in line for line in lines[:-1])
    assert "Traceback" not in studied.output
    assert "step 2/8" not in studied.output  # the rest is in train.log


def test_storage_url_is_in_no_file_and_no_output(studied):
    """The URL may contain a password."""
    files = [path for path in studied.folder.rglob("*") if path.is_file()]
    texts = [path for path in files if not path.name.startswith("separate-storage")]
    assert len(texts) > 20
    assert [path for path in texts if b"separate-storage" in path.read_bytes()] == []
    assert "separate-storage" not in studied.output


def test_each_trial_is_a_wandb_run_with_its_state(studied):
    runs = [read_wandb(folder) for folder in (studied.folder / "outputs" / "wandb").glob("offline-run-*")]
    states = {run["config"]["study"]["trial"]: run["summary"]["state"] for run in runs}
    shown = {"COMPLETE": "finished", "PRUNED": "pruned"}
    assert states == {trial.number: shown[trial.state.name] for trial in studied.study.trials}
    assert all(run["group"] == "mine" and run["summary"]["state"] in run["tags"] for run in runs)
    (line,) = [line for line in studied.output.splitlines() if line.startswith("W&B lacks")]
    begin, _, pattern = line.partition("`wandb sync ")
    assert begin == "W&B lacks 4 trials (0, 1, 2 and 1 more); upload with "
    assert len([*studied.folder.glob(pattern.rstrip("`"))]) == len(runs) == 4


def test_best_trial_runs_again_as_a_preset(studied, monkeypatch):
    monkeypatch.chdir(studied.folder)
    best = studied.study.best_trial
    assert "# python train.py +mine=best\n" in (studied.sweep / "best.yaml").read_text()
    saved = OmegaConf.load(studied.sweep / str(best.number) / ".hydra" / "config.yaml")
    config = resolve("train", compose("train", ["+mine=best"]), ["+mine=best"])
    assert config.sample_prompt == saved.sample_prompt == "${HOME} x"
    for group in ("model", "train", "data"):
        expected = {key: value for key, value in saved[group].items() if key != "auto_resume"}
        assert {key: getattr(getattr(config, group), key) for key in expected} == expected
    again = studied.run("train.py", "+mine=best", "wandb=off").stdout
    assert f"best {best.value:.4f}" in again or f"validation loss {best.value:.4f}" in again


def test_complete_study_does_nothing_and_other_settings_are_refused(studied):
    before = [trial.datetime_complete for trial in studied.study.trials]
    again = studied.run("train.py", *studied.command_line)
    assert "4 trials, 4 of them done" in again.stdout
    assert [trial.datetime_complete for trial in studied.study.trials] == before
    refused = studied.run("train.py", *studied.command_line, "train.max_steps=9", "train.beta2=0.9", expect=2)
    assert refused.stderr.splitlines() == [
        "error: train.beta2: 0.9 was requested, the study has a search from 0.9 to 0.999",
        "error: train.max_steps: 9 was requested, the study has 8",
        "error: study_name: mine exists with other settings; choose another name",
    ]


@pytest.mark.slow
def test_study_whose_trials_all_fail_is_a_one_line_error(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "exception@1-9"
    failed = workspace.run("train.py", *STUDY, "hydra.sweeper.n_trials=2", expect=1)
    (line,) = failed.stderr.splitlines()
    assert line == "error: study mine: none of its 2 trials gave a value (trial 0: RuntimeError: on purpose)" + (
        "; another range needs another study name"
    )
    assert all("on purpose" in trial.user_attrs["traceback"] for trial in study_in(workspace.folder).trials)
    assert "Traceback" in (workspace.folder / "outputs/sweeps/mine/1/train.log").read_text()


@pytest.mark.slow
def test_error_that_all_trials_share_stops_the_study_until_it_is_fixed(workspace: Workspace):
    wrong = workspace.run("train.py", *STUDY, "hydra.sweeper.n_trials=2", "train.device=cuda:9", expect=2)
    assert wrong.stderr.startswith("error: train.device: there is no cuda:9 here")
    assert [trial.state.name for trial in study_in(workspace.folder).trials] == ["WAITING"]
    workspace.run("train.py", *STUDY, "hydra.sweeper.n_trials=2", "train.device=cpu")
    assert [trial.state.name for trial in study_in(workspace.folder).trials] == ["COMPLETE", "COMPLETE"]


def test_with_values_equals_a_new_composition():
    line = ["experiment=quickstart", "hparams_search=optuna"]
    values = ["train.batch_size=32", "model.dropout=0.25", "train.learning_rate=1e-3", "sample_prompt='a b'"]
    changed = with_values(compose("train", line), values[:3])
    assert changed == compose("train", [*line, *values[:3]])
    assert changed.train.max_steps == pytest.approx(compose("train", line).train.max_steps / 2, abs=1)
    assert with_values(compose("train", line), ["model=gpt2"]) is None
    assert with_values(compose("train", line), ["train.batch_size=x"]) is None


def test_unreachable_storage_is_reported_without_password(workspace: Workspace):
    storage = "hydra.sweeper.storage='postgresql://me:secret@127.0.0.1:9/db'"
    refused = workspace.run("train.py", *STUDY, storage, expect=2)
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: storage: postgresql://me:***@127.0.0.1:9/db cannot be opened: ")
    assert "secret" not in refused.stderr + refused.stdout
    assert not (workspace.folder / "outputs").exists()


def test_runs_without_their_storage_are_refused_and_no_storage_is_made(workspace: Workspace):
    (workspace.folder / "outputs/sweeps/mine/0").mkdir(parents=True)
    refused = workspace.run("train.py", *STUDY, expect=2)
    assert "outputs/sweeps/mine has runs of a study that is not in the storage; move the folder away" in refused.stderr
    assert [path.name for path in (workspace.folder / "outputs/sweeps/mine").iterdir()] == ["0"]


# ---------------------------------------------------------------------------------------------------------------------
# Validation before the first trial


def check(*arguments: str) -> None:
    options = parse_arguments(list(arguments))
    (check_sweep if options.multirun else check_run)("train", options)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / "hydra" / "sweeper" / group).glob("*.yaml"))


PAIRS = [*((sampler, "asha") for sampler in names("sampler")), *(("random", pruner) for pruner in names("pruner"))]


@pytest.mark.parametrize(("sampler", "pruner"), PAIRS)
def test_every_sampler_and_pruner_can_be_chosen(sampler, pruner):
    line = ["train.learning_rate=1e-3,1e-2", "train.warmup_steps=5", "train.batch_size=8", "train.weight_decay=0.1"]
    line += ["train.beta2=0.9", "model.dropout=0.0", "data=stdlib", "model=gpt2_nano"]
    check("-m", "hparams_search=optuna", f"hydra/sweeper/sampler={sampler}", f"hydra/sweeper/pruner={pruner}", *line)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["hydra.sweeper.n_trials=0"], r"hydra.sweeper.n_trials: 0 is not a whole number of at least 1"),
        (["hydra.sweeper.n_trails=5"], r"Key 'n_trails' not in 'StudyConfig'. Did you mean: 'n_trials'"),
        (["hydra.sweeper.n_jobs=0"], r"hydra.sweeper.n_jobs: 0 is not"),
        (["hydra.sweeper.n_jobs=2"], r"hydra.sweeper.n_jobs: 2 trials at a time need hydra/launcher=joblib"),
        (["hydra.sweeper={n_trials:3}"], r"hydra.sweeper: one key at a time"),
        (
            ["hydra.sweeper.storage='${oc.env:NOBODY_HAS_SET_IT}'"],
            r"Environment variable 'NOBODY_HAS_SET_IT' not found",
        ),
        (["train.learning_rate=interval(1e-2, 1e-4)"], r"train.learning_rate=interval.*: `low <= high` must hold"),
        (["train.learning_rate=tag(lg, interval(1e-4, 1e-2))"], r"there is no tag lg, only log"),
        (["model=glob(gpt2*)"], r"a study needs the names, such as model=gpt2,gpt2_medium"),
        (["train.learning_rat=interval(1e-4, 1e-2)"], r"Key 'learning_rat' not in 'TrainingConfig'"),
        (["hydra.sweeper.study_name=model"], r"hydra.sweeper.study_name: 'model' must be letters"),
        (["hydra.sweeper.study_name=a/b"], r"hydra.sweeper.study_name: 'a/b' must be letters"),
        (["hydra.sweeper.direction=up"], r"hydra.sweeper.direction: 'up' is none of minimize, maximize"),
        (["hydra.sweeper.storage=study.db"], r"hydra.sweeper.storage: 'study.db' is none of sqlite:///FILE"),
        (["hydra.sweeper.storage='redis://me:secret@host'"], r"'redis://me:\*\*\*@host' is none of"),
        (["hydra/sweeper/pruner=medain"], r"Could not find 'hydra/sweeper/pruner/medain'. Available options.* median"),
        (["+hydra.sweeper.sampler.speed=3"], r"hydra.sweeper.sampler: .*unexpected keyword argument 'speed'"),
        (["hydra.sweeper.pruner.n_min_trials=0"], r"hydra.sweeper.pruner: .*must be at least 1, but got"),
        (["hydra/sweeper/sampler=grid"], r"hydra.sweeper.sampler: a grid needs values, and train.learning_rate is"),
        (["train.learning_rate=interval(-1, 1e-4)"], r"train.learning_rate: -1.0 is not a finite number above 0"),
        (["model.num_heads=choice(4,7)"], r"model.num_heads: 7 heads do not divide"),
        (["+hydra.sweeper.params.x=choice(4,7)"], r"a sweep is over other keys, such as train.beta2=0.9,0.99"),
        (["model.num_heads=choice(4,7"], r"not of the form key=value"),
        (["study.trial=3"], r"study.trial=3: only a study sets this key"),
        (["resume=latest"], r"resume=latest: one run at a time, without -m"),
    ],
)
def test_problem_of_a_study_is_reported_before_its_first_trial(arguments, problem):
    with pytest.raises(UserError, match=problem) as error:
        check("-m", "hparams_search=optuna", "data=stdlib", "model=gpt2_nano", *arguments)
    assert "secret" not in str(error.value)


def test_both_ends_and_every_choice_are_validated(monkeypatch):
    composed = []

    def remember(name: str, overrides: list[str]) -> list[str]:
        composed.extend(overrides)
        return []

    monkeypatch.setattr("gpt2.cli.preflight.validate_command_line", remember)
    monkeypatch.setattr("gpt2.cli.preflight.with_values", lambda *_: None)
    check("-m", "hparams_search=optuna")
    space = OmegaConf.load(CONF / "hparams_search" / "optuna.yaml").hydra.sweeper.params
    for key, text in space.items():
        tried = {override for override in composed if override.startswith(f"{key}=")}
        assert len(tried) == (4 if "choice" in text else 2)


def test_shapes_are_compared_at_equal_compute():
    check("-m", "hparams_search=optuna_shape", "data=stdlib")
    for shape in (["model.d_model=256", "model.num_layers=24"], ["model.d_model=768"]):
        line = ["hparams_search=optuna_shape", *shape, "data=stdlib"]
        config = resolve("train", compose("train", line), line)
        model, train = config.model, config.train
        assert (model.num_heads * 64, model.d_ff) == (model.d_model, 4 * model.d_model)
        weights = GPT2Model(replace(model, vocab_size=1, context_length=1, use_bias=False)).num_parameters()
        flops = 6 * weights * train.max_steps * train.batch_size * config.data.max_length
        assert flops == pytest.approx(1e16, rel=0.01)
        assert steps_of_compute(2e16, OmegaConf.structured(config)) == pytest.approx(2 * train.max_steps, rel=0.01)


def test_missing_launcher_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("gpt2.cli.launchers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`pip install hydra-submitit-launcher==1\.4\.0rc3`"):
        check("-m", "train.beta2=0.9,0.95", "hydra/launcher=submitit_slurm", "data=stdlib")


def test_empty_space_is_refused():
    values = ["train.learning_rate=1e-3", "train.batch_size=4", "train.warmup_steps=5", "train.weight_decay=0.1"]
    with pytest.raises(UserError, match="nothing is left to search"):
        check("-m", "hparams_search=optuna", *values, "train.beta2=0.9", "model.dropout=0.0", "data=stdlib")


def test_private_api_of_the_optuna_plugin():
    try:
        space, fixed = distributions(["train.beta2=interval(0.9, 0.99)", "train.seed=1,2", "train.max_steps=8"])
    except ImportError as error:
        pytest.fail(f"the Optuna plugin moved create_params_from_overrides, see gpt2/cli/search_space.py: {error}")
    assert space == {"train.beta2": FloatDistribution(0.9, 0.99), "train.seed": CategoricalDistribution([1, 2])}
    assert fixed == {"train.max_steps": "8"}


@pytest.mark.parametrize(("kind", "table"), [("sampler", SAMPLERS), ("pruner", PRUNERS)])
def test_files_of_samplers_and_pruners_match_the_table(kind, table):
    assert {composed_study(f"hydra/sweeper/{kind}={name}")[kind].name for name in names(kind)} == set(table)
    for name in names(kind):
        line = [f"hydra/sweeper/{kind}={name}", "hydra.sweeper.n_startup_trials=3", "hydra.sweeper.n_warmup_steps=1"]
        algorithm = composed_study(*line)[kind]
        options = table[algorithm.name].options(OptunaConfig(n_startup_trials=3, n_warmup_steps=1))
        if name != "median_early":  # its options differ on purpose
            assert {key: algorithm[key] for key in options.keys() & algorithm.keys()} == {
                key: value for key, value in options.items() if key in algorithm
            }


@pytest.mark.parametrize("name", ["nsgaii", "motpe", "foo"])
def test_sampler_that_is_not_ours_is_refused_with_the_list_of_ours(name):
    with pytest.raises(UserError) as error:
        composed_study(f"hydra/sweeper/sampler={name}")
    assert f"Could not find 'hydra/sweeper/sampler/{name}'" in str(error.value)
    assert str(error.value).endswith(f": {', '.join(sorted(SAMPLERS))}")


def composed_study(*line: str) -> DictConfig:
    sweeper = study_sweeper(["hparams_search=optuna", *line])
    assert sweeper is not None
    return sweeper


def test_settings_of_a_study_have_the_defaults_of_the_python_api():
    default = replace(study_settings(composed_study()), storage=None)
    assert default == OptunaConfig(sampler="tpe", pruner="median")


# ---------------------------------------------------------------------------------------------------------------------
# In other processes


@pytest.mark.slow
def test_killed_worker_loses_only_its_own_trial(workspace: Workspace):
    """For joblib. submitit has a process for each run anyway, see tests/cli/test_launchers.py."""
    workspace.environment["GPT2_FAULT"] = "kill@3#1,slow@1-99#0"  # the slow trial outlives the killed one
    two = ["hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=3", "hydra/launcher=joblib", "train.max_steps=30"]
    two.append("train.num_workers=1")  # workers that have processes of their own
    process = workspace.start("train.py", *STUDY, *two, "hydra/sweeper/pruner=none")
    assert process.wait(600) == 0  # PyTorch may print that a loader lost its parent
    trials = study_in(workspace.folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["reason"].startswith("its process died 3 times, ")


def trials_with_a_checkpoint(workspace: Workspace) -> set[str]:
    return {path.parents[1].name for path in workspace.folder.glob("outputs/sweeps/mine/*/checkpoints/step_*.pth")}


def pids_in(folder: Path) -> list[int]:
    """The processes with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


PARALLEL = [*STUDY, "train.max_steps=60", "train.eval_every=10", "hydra/sweeper/pruner=none"]
PARALLEL += ["hydra/launcher=joblib", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=2"]


def log_of(workspace: Workspace, number: int) -> str:
    return (workspace.folder / f"outputs/sweeps/mine/{number}/train.log").read_text()


def states(workspace: Workspace) -> list[str]:
    return [trial.state.name for trial in study_in(workspace.folder).trials]


@pytest.mark.slow
def test_terminated_worker_and_interrupted_study_resume(workspace: Workspace):
    """After SIGTERM to a worker, another one resumes its trial. After Ctrl-C to all processes, the study resumes."""
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    process = workspace.start("train.py", *PARALLEL, start_new_session=True)
    wait_for(lambda: trials_with_a_checkpoint(workspace) == {"0", "1"})
    holder = (workspace.folder / "outputs/sweeps/mine/1/.lock").read_text()
    os.kill(int(re.search(r"process (\d+)", holder)[1]), signal.SIGTERM)
    wait_for(lambda: "Resuming after step" in log_of(workspace, 1))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert states(workspace)[1] == "WAITING"
    workspace.run("train.py", *PARALLEL)
    assert states(workspace) == ["COMPLETE", "COMPLETE"]
    assert log_of(workspace, 1).count("Resuming after step") == 2


@pytest.mark.slow
def test_workers_of_a_killed_sweeper_end_and_the_study_resumes(workspace: Workspace):
    workspace.environment["GPT2_FAULT"] = "slow@1-99"
    command = workspace.command("train.py", *PARALLEL)  # not forked, as the workers watch their parent
    process = subprocess.Popen(command, cwd=workspace.folder, env=workspace.environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: trials_with_a_checkpoint(workspace) == {"0", "1"})
    process.kill()
    process.wait()
    workspace.run("train.py", *PARALLEL)
    assert states(workspace) == ["COMPLETE", "COMPLETE"]
    assert all("Resuming after step" in log_of(workspace, number) for number in range(2))
    wait_for(lambda: not pids_in(workspace.folder), seconds=120)


@pytest.mark.slow
def test_memory_does_not_grow_over_trials(workspace: Workspace):
    """A process trains 7 models in sequence, each with 10 MB of weights and twice that in its optimizer."""
    large = ["model.d_model=256", "model.d_ff=1024", "model.num_layers=3", "train.max_steps=2", "train.eval_every=2"]
    script = f"""
import resource, runpy, sys, gpt2.search.trial as trial
sys.path.insert(0, {str(ROOT)!r})
grown, tell = [], trial.RunningTrial._tell
def measured(self, outcome):
    tell(self, outcome)
    with open("/proc/self/statm") as file:
        grown.append(int(file.read().split()[1]) * resource.getpagesize() / 1e6)
trial.RunningTrial._tell = measured
sys.argv[1:] = {[*STUDY, "hydra.sweeper.n_trials=7", *large]}
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
print("grown", *grown)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=workspace.folder, env=workspace.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sizes = [float(size) for size in done.stdout.splitlines()[-1].split()[1:]]
    assert len(sizes) == 7
    assert sizes[-1] - sizes[3] < 10, sizes
