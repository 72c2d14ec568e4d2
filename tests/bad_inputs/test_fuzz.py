"""Random bad inputs, the same in each run: each ends in a result or in lines for a user, never in a traceback.

They are given to the functions that the scripts consist of, in this process: a process for each would take minutes.
"""

import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gpt2.analysis.compare import Comparison
from gpt2.analysis.compare_html import page
from gpt2.analysis.runs import find_runs
from gpt2.analysis.tables import as_text
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.pretrained import model_card, open_model
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose, leaves
from gpt2.cli.hydra_private import parse_arguments
from gpt2.cli.preflight import check_run
from gpt2.cli.script import take_prompt
from gpt2.config import InferenceConfig
from gpt2.errors import UserError
from gpt2.generation.prompts import read_prompts
from gpt2.inference import TextGenerator
from gpt2.validation import replace_checked
from tests.bad_inputs.harness import LONGEST_LINE, changes, tree
from tests.conftest import Workspace
from tests.helpers import nasty_texts

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("GPT2_FUZZ", 100))  # of each kind
# Values of the wrong type, beyond any range, or that mean something to a shell, to YAML, to Hydra or to a terminal.
PLAIN: list[Any] = [
    *(None, True, False, 0, -1, 1, 5, 2**31, 2**63, -(2**70), 1e308, 1e-320, float("nan"), float("inf"), -0.5),
    *("", "x", "null", "1e-3", "../x", "/proc/x", "a" * 300, "\x1b[31m", "\u202eb", "a\nb", "\0", "é", "🦜", "\ud800"),
    *("${oc.env:HOME}", "${nowhere}", "???", "{", "[", "-rf", "$(touch p)", "%s", "latest", "corpus.txt"),
    *([], [1], [[]], ["x", None], {}, {"a": {"b": 1}}, {"_target_": "os.system"}),
]
WORDS = [
    *(
        "",
        "x",
        "null",
        "true",
        "0",
        "-1",
        "1.5",
        "1e400",
        "nan",
        "???",
        "{",
        "}",
        "[",
        "[1,2]",
        "[[x]]",
        "{a:1}",
        "'",
        "''",
    ),
    *("${nowhere}", "${oc.env:NOT_SET}", "${now:%S}", "${", "a,b", "1,2", "choice(1,2)", "range(1,3)", "interval(0,1)"),
    *(
        "glob(*)",
        "sort(1,2)",
        "../x",
        "/proc/x",
        "~",
        "a=b",
        "a b",
        "é",
        "🦜",
        "\udcff",
        "\x1b[31m",
        "a\\nb",
        "a" * 300,
    ),
    *("latest", "corpus.txt", "gpt2", "bytes", "int(1.5)", "str(1)", "1_000", "0x10", "007", "2026-11-29", ".5", "@"),
]


class Outcomes:
    """Counts actions that are refused, and collects those that end in anything but a result or lines for a user."""

    def __init__(self) -> None:
        self.refused = 0
        self.wrong: Counter[str] = Counter()

    def of(self, act: Callable[[], object]) -> bool:
        """Whether an action is refused."""
        try:
            act()
        except UserError as error:
            self.refused += 1
            for problem in error.problems:
                if not problem.strip() or len(problem) > LONGEST_LINE or "\n" in problem:
                    self.wrong[f"not a line: {problem!r:.300}"] += 1
            return True
        except Exception as error:  # noqa: BLE001
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "/gpt2/" in f.filename][-1]
            self.wrong[f"{error!r:.200} in {ours.filename}:{ours.lineno}, {frame.name}"] += 1
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def command_line(random: Random, keys: list[str]) -> list[str]:
    arguments = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        key = random.choice(keys)
        if random.random() < 0.1:
            key = key.replace(random.choice(key), random.choice(["", "x", ".", "/"]), 1)
        value = random.choice(WORDS)
        arguments.append(f"{random.choice(['', '', '', '', '+', '++'])}{key}={value}")
    return [argument for argument in arguments if not argument.startswith("-")]


def test_command_lines(place: Workspace):
    random, outcomes, before = Random(1), Outcomes(), tree(place.folder.parent)
    scripts = ["train", "evaluate", "generate", "generate", "export", "export", "benchmark_generation"]
    with chdir(place.folder):
        keys = {
            name: [
                *leaves(compose(name, []), resolve=False),
                "model",
                "data",
                "hydra.run.dir",
                "hydra/launcher",
                "hydra",
            ]
            for name in set(scripts)
        }
        for _ in range(COUNT):
            name = random.choice(scripts)
            arguments, _ = take_prompt(command_line(random, keys[name]))
            options = parse_arguments(arguments)
            outcomes.of(lambda: resolve(name, check_run(name, options), options.overrides))  # noqa: B023
    assert not outcomes.wrong
    assert COUNT / 2 < outcomes.refused < COUNT  # some are right
    assert changes(before, tree(place.folder.parent)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_prompts(place: Workspace, checkpoint: Path, tmp_path: Path):
    random, outcomes = Random(2), Outcomes()
    generator = TextGenerator(str(checkpoint), "cpu")
    options = [key for key in vars(InferenceConfig()) if key not in ("precision", "quantization", "compile")]
    for text in nasty_texts(COUNT, seed=3):
        data = bytearray(text.encode())
        if random.random() < 0.3:
            data[random.randrange(len(data))] = random.randrange(256)
        _, prompt = take_prompt([f"prompt={os.fsdecode(bytes(data)).replace(chr(0), '')}"])
        assert prompt is not None
        values = {random.choice(options): random.choice(PLAIN) for _ in range(2)} if random.random() < 0.5 else {}
        values = {key: value for key, value in values.items() if key not in ("num_return_sequences",)}

        def write(prompt: str = prompt, values: dict = values) -> None:
            config = replace_checked(InferenceConfig(max_new_tokens=2, seed=1), values | {"max_new_tokens": 2})
            (continuation,) = generator.continuations([prompt], config)
            assert json.loads(json.dumps(vars(continuation)))["prompt"] == prompt

        outcomes.of(write)
        file = tmp_path / random.choice(["a.txt", "a.jsonl"])
        file.write_bytes(b'{"prompt": ' + bytes(data) + b"}" if random.random() < 0.5 else bytes(data))
        outcomes.of(lambda file=file: read_prompts(file))
    assert not outcomes.wrong
    assert COUNT / 2 < outcomes.refused < 2 * COUNT  # prompts, and files of them


# ---------------------------------------------------------------------------------------------------------------------
# Run folders


def swap(random: Random, values: Any) -> Any:
    """Plain values of JSON with one of them, at any depth, replaced by another or left out."""
    if isinstance(values, dict | list) and values and random.random() < 0.85:
        key = random.choice(list(values) if isinstance(values, dict) else range(len(values)))
        if random.random() < 0.1:
            del values[key]
        else:
            values[key] = swap(random, values[key])
        return values
    return random.choice(PLAIN)


def damage(random: Random, run: Path) -> None:
    """Change one file of a run folder."""
    path = random.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    kind = random.random()
    content = bytearray(path.read_bytes())
    path.unlink()  # it may be another name of a file
    if path.suffix == ".pth" and kind < 0.6:
        path.write_bytes(content)
        with suppress(UserError):  # it is damaged already
            record, tensors = swap(random, checkpoint.read_record(path)), checkpoint.read_tensors(path)
            checkpoint.write_checkpoint(path, tensors, record if isinstance(record, dict) else {})
    elif path.suffix in (".json", ".jsonl") and kind < 0.7:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        number = random.randrange(len(lines))
        lines[number] = json.dumps(swap(random, json.loads(lines[number])))
        path.write_text("\n".join(lines), errors="replace")
    elif kind < 0.8:
        for _ in range(random.choice([1, 10])):
            content[random.randrange(len(content))] = random.randrange(256) if content else 0
        path.write_bytes(content)
    elif kind < 0.9:
        path.write_bytes(content[: random.randrange(len(content) + 1)])


def read_everything(run: Path) -> list[Callable[[], object]]:
    def compared() -> None:
        comparison = Comparison(find_runs([str(run)]))
        as_text(comparison.rows())
        json.dumps(comparison.records())
        page(comparison)

    def opened() -> None:
        trained = open_model(run)
        trained.build()
        model_card(trained)
        trained.tokenizer_for_text().decode([0])

    def completed(name: str, *arguments: str) -> Callable[[], object]:
        return lambda: resolve(name, compose(name, list(arguments)), list(arguments))

    resumed = completed("train", f"resume={run}")
    return [
        compared,
        opened,
        completed("generate", f"checkpoint={run}"),
        completed("evaluate", f"checkpoint={run}"),
        resumed,
    ]


def test_run_folders(place: Workspace, tmp_path: Path):
    random, good = Random(4), place.folder / "outputs/runs/gpt2/run"
    run, outcomes, refused = Path("outputs/runs/gpt2/mutant"), Outcomes(), 0
    with chdir(tmp_path):
        shutil.copy(place.folder / "corpus.txt", tmp_path)
        for _ in range(COUNT):
            shutil.copytree(good, run, ignore=shutil.ignore_patterns("step_*", "curves.png"))
            for _ in range(random.choice([1, 1, 2])):
                damage(random, run)
            refused += sum(map(outcomes.of, read_everything(run))) > 0
            shutil.rmtree(run)
        assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "outputs"}
    assert not outcomes.wrong
    assert COUNT / 10 < refused < COUNT
