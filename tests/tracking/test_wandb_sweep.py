"""conf/wandb_sweep.yaml: a W&B agent starts runs of train.py that the server of the sweep can compare."""

import yaml
from wandb import Settings
from wandb.sdk.lib.config_util import save_config_file_from_dict

from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose
from gpt2.runtime.repository import CONF
from tests.conftest import TINY
from tests.wandb_server import KEY, WandbServer

SWEEP = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
SMALL = [argument for argument in TINY if argument != "wandb=off"]


def parameters(which: int) -> dict[str, dict]:
    """The first or the last value of each parameter, in the format of the server."""
    ends = {name: (space.get("values") or [space["min"], space["max"]]) for name, space in SWEEP["parameters"].items()}
    return {name: {"value": values[which]} for name, values in ends.items()}


def agents_command(args: dict[str, dict]) -> list[str]:
    """The command as `Agent._command_run` of wandb makes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args  # slow to import

    variables = {**create_sweep_command_args({"args": args}), "interpreter": ["python"], "env": ["/usr/bin/env"]}
    variables["program"] = [SWEEP["program"]]
    words = [[word] if not word.startswith("${") else variables[word[2:-1]] for word in SWEEP["command"]]
    assert create_sweep_command(SWEEP["command"]) == SWEEP["command"]  # the command contains no environment variables
    return [word for part in words for word in part]


def test_values_of_the_sweep_are_valid():
    for which in (0, -1):
        command = agents_command(parameters(which))
        assert command[:3] == ["/usr/bin/env", "python", "train.py"]
        config = resolve("train", compose("train", command[3:]), command[3:])
        assert config.train.learning_rate == parameters(which)["train.learning_rate"]["value"]


def test_run_of_an_agent_belongs_to_the_sweep(workspace):
    save_config_file_from_dict(str(workspace.folder / "sweep.yaml"), parameters(0))
    del workspace.environment["WANDB_MODE"]
    workspace.environment |= {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "agents-run", "WANDB_PROJECT": "theirs"}
    workspace.environment |= {"WANDB_SWEEP_PARAM_PATH": "sweep.yaml", "WANDB_API_KEY": KEY}
    assert {"sweep_id", "sweep_param_path"} <= Settings.model_fields.keys()
    with WandbServer() as server:
        workspace.environment["WANDB_BASE_URL"] = server.url
        _, _, script, *arguments = agents_command(parameters(0))
        done = workspace.run(script, *arguments, *SMALL)
    (run,) = workspace.runs()
    assert (run / "wandb_id").read_text() == "agents-run"
    assert list(server.runs) == ["agents-run"]
    data = server.runs["agents-run"]
    assert (data["upserts"][0]["sweep"], data["upserts"][0]["project"]) == ("sweep1", "theirs")
    assert [row["step"] for row in data["history"] if "val/loss" in row] == [4, 8]
    assert isinstance(data["summary"]["val/loss"], float)
    assert (data["complete"], data["exit_code"]) == (True, 0)
    assert "upload" not in done.stdout
