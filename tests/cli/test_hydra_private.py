"""The private parts of Hydra are where `gpt2.cli.hydra_private` expects them."""

import inspect

from hydra import __version__
from omegaconf import DictConfig

from gpt2.cli.compose import compose
from gpt2.cli.hydra_private import parse_arguments, run_composed, run_job
from gpt2.config import ExportRun

MOVED = f"hydra-core {__version__} differs from 1.4.0rc3: adapt gpt2/cli/hydra_private.py, {{}}"


def test_arguments_are_parsed():
    options = vars(parse_arguments(["a=1", "-m", "b=2"]))
    expected = {"overrides", "multirun", "cfg", "info", "help", "hydra_help", "shell_completion"}
    expected |= {"config_path", "config_dir", "config_name", "experimental_rerun"}
    assert expected <= options.keys(), MOVED.format("get_args_parser has other options")
    assert (options["overrides"], options["multirun"]) == (["a=1", "b=2"], True)


def test_composed_configuration_is_run(tmp_path):
    parameters = ["task_function", "config", "job_dir_key", "job_subdir_key", "hydra_context", "configure_logging"]
    assert list(inspect.signature(run_job).parameters) == parameters, MOVED.format("run_job has other parameters")
    composed = compose("export", [f"hydra.run.dir={tmp_path}/run", "hydra.output_subdir=.hydra"], with_hydra=True)
    seen: list[DictConfig] = []
    assert run_composed(composed, lambda config: seen.append(config) or 7) == 7
    assert [config.keys() for config in seen] == [vars(ExportRun()).keys()], MOVED.format(
        "the task gets something else"
    )
    files = {path.name for path in (tmp_path / "run" / ".hydra").iterdir()}
    assert files == {"config.yaml", "hydra.yaml", "overrides.yaml"}, MOVED.format("other files are written")
