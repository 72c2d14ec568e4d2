"""Every command of the README runs."""

import math
import re
import shlex
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from gpt2.cli.compose import compose, merged
from gpt2.config import DistributedConfig, TrainingConfig
from gpt2.runtime.dist_env import DistEnv
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import validate_distributed
from tests.conftest import ROOT, TEXT, TINY, Workspace
from tests.helpers import noisy_model, tiny_config, transformers_twin

README = (ROOT / "README.md").read_text()
PARTS = {"distributed": DistributedConfig, "train": TrainingConfig}
SHORT = ["train.max_steps=2", "train.eval_batches=2", "inference.max_new_tokens=5", "wandb=off"]


def commands(document: str = README) -> list[str]:
    """The lines of a document's shell blocks, comments and continuation lines joined away."""
    blocks = re.findall(r"```bash\n(.*?)```", document, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def scripts() -> list[list[str]]:
    """The calls of our own scripts among them."""
    parts = [part.strip() for command in commands() for part in re.split(r"&&|\|", command)]
    return [shlex.split(part.split(" > ")[0])[1:] for part in parts if part.startswith(("python ", "torchrun "))]


def test_the_readme_has_the_commands_that_this_file_runs():
    assert len(scripts()) > 10
    known = ("python ", "torchrun ", "pip install ", "pytest", "git clone ", "wandb ", "echo ")
    assert not [command for command in commands() if not command.startswith(known)]


def test_the_commands_for_clusters_compose_and_their_steps_can_be_divided():
    lines = [line for line in commands((ROOT / "docs" / "scale.md").read_text()) if not line.startswith("export ")]
    assert len(lines) > 8
    for line in lines:
        before, name, words = re.split(r"(train|evaluate|torchrun)(?:\.py|\.sbatch) ", line, maxsplit=1)
        overrides = [word for word in shlex.split(words) if word not in ("-m", "train.seed=1,2,3")]
        if name == "evaluate":
            continue
        config = OmegaConf.to_container(compose("train", overrides), resolve=True)
        sizes = dict(re.findall(r"--(nnodes|nproc_per_node)=(\d+)", before)) or {"nnodes": "2", "nproc_per_node": "8"}
        group = math.prod(map(int, sizes.values())) if before.startswith(("torchrun", "sbatch")) else 1
        started = DistEnv(0, group, 0, 8, by_torchrun=group > 1)
        typed = [OmegaConf.to_object(merged(cls, config[key])) for key, cls in PARTS.items()]
        assert validate_distributed(*typed, started) == [], line


@pytest.mark.slow
def test_every_script_call_of_the_readme_runs_in_the_order_it_stands_there(workspace: Workspace, tmp_path):
    """As printed, but for runs cut to two steps of a tiny model, and tiny weights in the Hub's cache for OpenAI's; what
    needs a corpus that is not here is composed, not run."""
    for name in ("gpt2", "README.md", "experiments"):  # what the commands find in a clone
        (workspace.folder / name).symlink_to(ROOT / name)
    (workspace.folder / "prompts.txt").write_text("def f\nimport\n")
    (workspace.folder / "books").mkdir()
    (workspace.folder / "books" / "book.txt").write_text(TEXT)
    transformers_twin(noisy_model(tiny_config(vocab_size=257, context_length=32))).save_pretrained(tmp_path / "weights")
    GPT2Tokenizer.of_bytes().to_folder(tmp_path / "weights", context_length=32)
    for name in ("gpt2", "gpt2-medium", "gpt2-xl"):
        workspace.cache_as_from_hub(f"openai-community/{name}", tmp_path / "weights")

    tiny_model = [argument for argument in TINY if argument.startswith("model.")]
    for script, *arguments in scripts():
        line = " ".join(arguments)
        has_data_here = any(words in line for words in ("experiment=", "data=text", "optuna_quick"))
        if "tests.stress" in arguments:
            continue  # tests/stress/test_stress.py runs it
        if script.startswith("--nproc"):
            done = workspace.module_anew(
                "torch.distributed.run", script, str(ROOT / arguments[0]), *arguments[1:], *SHORT, *tiny_model
            )
            assert done.returncode == 0, done.stderr
        elif script == "-m":
            small = {
                "generation": ["model=gpt2_nano", *tiny_model, "new_tokens=2", "prompt_tokens=4"],
                "training": ["model=gpt2_nano", *tiny_model, "context=8", "overhead_steps=2", "memory=false"],
                "data": ["data=text", "data.files=[README.md]"],
                "startup": [],
            }
            more = {"study": ["jobs=0"]}  # a study takes half an hour; this looks for its runs
            if arguments[1] == "benchmark":
                more = {"benchmark": [*small[arguments[2]], "repetitions=1"]}
            done = workspace.module(*arguments, *more.get(arguments[1], []))
            assert done.returncode == 0, done.stderr
        elif script == "train.py" and "resume=latest" in line:
            workspace.run(script, *arguments, "train.max_steps=3")
        elif script == "train.py" and has_data_here:
            trials = ["hydra.sweeper.n_trials=2"] if "hparams_search" in line else []
            workspace.run(script, *arguments, *SHORT, *trials, *([] if "init_from" in line else tiny_model))
        elif script == "train.py" or "data=wikitext" in line:
            asked = [argument for argument in arguments if argument != "-m"]
            workspace.run(script, *asked, *([] if "--" in line else ["--cfg", "job"]))
        else:
            workspace.run(script, *arguments)


def test_the_library_example_of_the_readme_runs(workspace: Workspace):
    (workspace.folder / "README.md").symlink_to(ROOT / "README.md")
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example.replace("max_steps=100", "max_steps=4")],
        cwd=workspace.folder,
        env=workspace.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (workspace.folder / "checkpoints" / "best_model.pth").is_file()
