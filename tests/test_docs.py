"""The commands of the README and of every page of docs/ work; their lines are short; their links lead somewhere."""

import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gpt2.cli.compose import compose, parsed
from gpt2.runtime.dist_env import DistEnv
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import validate_distributed
from tests.conftest import ROOT, TEXT, TINY, Workspace, made_once
from tests.helpers import noisy_model, tiny_config, transformers_twin
from tests.tasks.documents import write_tasks

PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [*sorted((ROOT / "experiments").glob("*/README.md")), ROOT / "tests" / "README.md"]

SHORT = ["train.max_steps=2", "train.eval_batches=2", "inference.max_new_tokens=5", "wandb=off"]
TINY_MODEL = [*(argument for argument in TINY if argument.startswith("model.")), "model.num_heads=2"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, without comments and with continuation lines joined, and the commands of the
    README's table of tasks."""
    text = page.read_text().split("## How to add")[0]  # the rest is run by tests/test_architecture.py
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    tasks = re.findall(r"^\| [^|]+ \| `([^`]+)` \|", text, flags=re.MULTILINE) if page.name == "README.md" else []
    return lines + tasks


def scripts(page: Path) -> list[list[str]]:
    """The words of those commands that run our own scripts and modules, from the script's name on."""
    parts = [part.strip() for command in commands(page) for part in re.split(r"&&|\|", command)]
    return [shlex.split(part.split(" > ")[0])[1:] for part in parts if part.startswith(("python ", "torchrun "))]


def as_composed(words: list[str]) -> tuple[str, list[str]] | None:
    """The name of a command's configuration and its overrides, with the first value of sweeps. None without one."""
    script, *rest = [word for word in words if not word.startswith(("--nproc", "--nnodes", "--rdzv", "--max-restarts"))]
    if script == "-m":
        if rest[0] != "gpt2.main" or rest[1] in ("compare", "study"):
            return None
        _, command, *rest = rest
        name = f"benchmark_{rest.pop(0)}" if command == "benchmark" else command
    else:
        name = script.removesuffix(".py")
    rest = [word for word in rest if not word.startswith(("-", "prompt=", "job", "resume="))]
    first = [
        f"{override.key_or_group}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in parsed(rest)
    ]
    return name, first


def needs_more(line: str) -> bool:
    """Whether a command needs a GPU, or text or programs that are not on this machine."""
    is_training_on_default = line.startswith("train.py") and not any(
        words in line for words in ("experiment=", "data=text", "data=stdlib", "optuna_quick", "resume=", "--help")
    )
    return is_training_on_default or any(
        words in line
        for words in ("device=cuda", "peer=", "data=wikitext", "data=openwebtext", "data=fineweb", "experiment=gpt2_")
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_known(page):
    known = ("python ", "torchrun ", "pip install ", "pytest", "git clone ", "wandb ", "echo ", "sbatch ", "export ")
    assert not [command for command in commands(page) if not command.startswith(known)]


def test_commands_are_found():
    assert sum(len(scripts(page)) for page in PAGES) > 50


@pytest.mark.parametrize("page", [page for page in PAGES if scripts(page)], ids=name_of)
def test_commands_compose(page):
    for words in scripts(page):
        if composed := as_composed(words):
            name, overrides = composed
            OmegaConf.to_container(compose(name, overrides), resolve=not name.startswith("benchmark"))


def test_steps_of_distributed_commands_can_be_divided():
    lines = [line for line in commands(ROOT / "docs" / "scale.md") if not line.startswith("export ")]
    assert len(lines) > 8
    for line in lines:
        before, name, words = re.split(r"(train|evaluate|torchrun)(?:\.py|\.sbatch) ", line, maxsplit=1)
        overrides = [word for word in shlex.split(words) if word not in ("-m", "train.seed=1,2,3")]
        if name == "evaluate":
            continue
        config = compose("train", overrides)
        sizes = dict(re.findall(r"--(nnodes|nproc_per_node)=(\d+)", before)) or {"nnodes": "2", "nproc_per_node": "8"}
        ranks = math.prod(map(int, sizes.values())) if before.startswith(("torchrun", "sbatch")) else 1
        started = DistEnv(0, ranks, 0, 8, by_torchrun=ranks > 1)
        typed = [OmegaConf.to_object(config[key]) for key in ("distributed", "train")]
        assert validate_distributed(*typed, started) == [], line


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place) if place else page
        assert path.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) >= 120 and not line.startswith("|")]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def prepare(folder: Path) -> None:
    """The corpus of the README's first command, and a run."""
    (folder / "corpus.txt").write_text(TEXT)
    workspace = Workspace(folder)
    workspace.run("train.py", "experiment=quickstart", *SHORT, *TINY_MODEL, "hydra.run.dir=quickstart")
    workspace.run("train.py", *TINY)


@pytest.fixture
def clone(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A workspace with the files of a clone, a run, and tiny weights in the Hub's cache in place of OpenAI's."""
    prepared = made_once("clone", prepare)
    workspace.environment["XDG_CACHE_HOME"] = str(prepared / "cache")  # all pages use the same corpora
    shutil.copytree(prepared / "outputs", workspace.folder / "outputs", symlinks=True)
    for name in ("gpt2", "README.md", "experiments"):
        (workspace.folder / name).symlink_to(ROOT / name)
    (workspace.folder / "prompts.txt").write_text("def f\nimport\n")
    write_tasks(workspace.folder / "tasks")
    (workspace.folder / "books").mkdir()
    (workspace.folder / "books" / "book.txt").write_text(TEXT)
    transformers_twin(noisy_model(tiny_config(vocab_size=257, context_length=32))).save_pretrained(tmp_path / "weights")
    GPT2Tokenizer.of_bytes().to_folder(tmp_path / "weights", context_length=32)
    for name in ("gpt2", "gpt2-medium", "gpt2-xl"):
        workspace.cache_as_from_hub(f"openai-community/{name}", tmp_path / "weights")
    return workspace


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if scripts(page) and page.name != "scale.md"], ids=name_of)
def test_commands_run_in_order(clone: Workspace, page):
    """Run the commands as printed, except that runs have two steps and a tiny model. Commands that need a GPU or text
    that is not on this machine are only composed (above); other tests run the benchmarks and the fault injection."""
    for script, *arguments in scripts(page):
        line = " ".join([script, *arguments])
        if needs_more(line) or {"benchmark", "doctor", "tests.stress"} & set(arguments):
            continue
        if script.startswith("--nproc"):
            place = str(ROOT / arguments[0])
            command = ["torch.distributed.run", script, place, *arguments[1:], *SHORT, *TINY_MODEL]
            done = clone.module(*command)
            assert done.returncode == 0, done.stderr
        elif script == "-m" and "study" in arguments:  # its runs take half an hour, and jobs=0 only collects them
            done = clone.module(*arguments, "jobs=0")
            assert done.returncode == 2
            assert "runs are missing" in done.stderr
        elif script == "-m":
            done = clone.module(*arguments)
            assert done.returncode == 0, done.stderr
        elif script == "train.py" and "resume=latest" in line:
            clone.run(script, *arguments, "train.max_steps=10")
        elif script == "train.py" and not {"--help", "--cfg"} & set(arguments):
            trials = ["hydra.sweeper.n_trials=2"] if "hparams_search" in line else []
            clone.run(script, *arguments, *SHORT, *trials, *([] if "init_from" in line else TINY_MODEL))
        else:
            clone.run(script, *arguments, *(["tasks_folder=tasks"] if " tasks=" in line else []))
