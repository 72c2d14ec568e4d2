"""Bad inputs that hypothesis makes up: each ends in a result or in lines for a user, never in a traceback.

They are given to the functions that the scripts consist of, in this process: a process for each would take minutes.
They are the same in each run; of one that fails, hypothesis prints the smallest that fails in the same way.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from gpt2.analysis.compare import Comparison
from gpt2.analysis.compare_html import page
from gpt2.analysis.runs import find_runs
from gpt2.analysis.tables import as_text
from gpt2.checkpoint.format import read_record
from gpt2.checkpoint.pretrained import model_card, open_model
from gpt2.cli.command import take_prompt
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose, hydra_syntax, leaves
from gpt2.cli.hydra_private import parse_arguments
from gpt2.cli.preflight import check_run
from gpt2.config import InferenceConfig
from gpt2.errors import UserError
from gpt2.generation.prompts import read_prompts
from gpt2.inference import TextGenerator
from gpt2.tracking.tracker import ABOUT, METRICS
from gpt2.validation import replace_checked
from tests.bad_inputs.harness import LONGEST_LINE, changes, tree
from tests.conftest import Workspace
from tests.helpers import nasty_texts, rewrite_record

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("GPT2_FUZZ", 100))  # of each kind
FUZZ = settings(
    max_examples=COUNT,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No example comes from constants of the imported modules."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)


# Values of the wrong type, beyond any range, or that mean something to a shell, to YAML, to Hydra or to a terminal.
PLAIN = [
    *(None, True, False, 0, -1, 1, 5, 2**31, 2**63, -(2**70), 1e308, 1e-320, float("nan"), float("inf"), -0.5),
    *("", "x", "null", "1e-3", "../x", "/proc/x", "a" * 300, "\x1b[31m", "\u202eb", "a\nb", "\0", "é", "🦜", "\ud800"),
    *("${oc.env:HOME}", "${nowhere}", "???", "{", "[", "-rf", "$(touch p)", "%s", "latest", "corpus.txt"),
    *([], [1], [[]], ["x", None], {}, {"a": {"b": 1}}, {"_target_": "os.system"}),
]
WORDS = [
    *("", "x", "null", "true", "0", "-1", "1.5", "1e400", "nan", "???", "{", "}", "[", "[1,2]", "[[x]]", "{a:1}"),
    *("'", "''", "${nowhere}", "${oc.env:NOT_SET}", "${now:%S}", "${", "a,b", "1,2", "choice(1,2)", "range(1,3)"),
    *("interval(0,1)", "glob(*)", "sort(1,2)", "../x", "/proc/x", "~", "a=b", "a b", "é", "🦜", "\udcff", "\x1b[31m"),
    *("a\\nb", "a" * 300, "latest", "corpus.txt", "gpt2", "bytes", "int(1.5)", "str(1)", "1_000", "0x10", "007"),
    *("2026-11-29", ".5", "@"),
]
VALUES = st.recursive(
    st.sampled_from(PLAIN) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
# What an argument of a command line may hold: bytes that need not be UTF-8, without NUL.
TYPED = (st.text(max_size=20) | st.binary(max_size=20).map(os.fsdecode)).map(lambda text: text.replace("\0", ""))


def is_refused(act: Callable, *arguments: Any) -> bool:
    """Whether an action ends in lines for a user instead of a result."""
    try:
        act(*arguments)
    except UserError as error:
        for problem in error.problems:
            assert problem.strip() and len(problem.splitlines()) == 1 and len(problem) <= LONGEST_LINE
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def commands(name: str) -> st.SearchStrategy[tuple[str, list[str]]]:
    """A script, and arguments for it."""
    defaults = leaves(compose(name, []), resolve=False)
    key = st.sampled_from([*defaults, "model", "data", "hydra.run.dir", "hydra/launcher", "hydra"])
    cut, by = st.integers(0, 40), st.sampled_from(["", "x", ".", "/"])
    misspelt = st.builds(lambda key, cut, by: key[:cut] + by + key[cut + 1 :], key, cut, by)
    value = st.sampled_from(WORDS) | TYPED | (st.integers() | st.floats() | st.integers(0, 9)).map(str)
    good = st.sampled_from([f"{key}={hydra_syntax(value)}" for key, value in defaults.items()])
    changed = st.builds("{}{}={}".format, st.sampled_from(["", "", "", "+", "++"]), key | key | key | misspelt, value)
    return st.tuples(st.just(name), st.lists(good | good | changed | changed | changed | TYPED, min_size=1, max_size=2))


def test_command_lines(place: Workspace):
    before, outcomes = tree(place.folder.parent), Counter[bool]()
    with chdir(place.folder):

        @FUZZ
        @given(st.one_of(map(commands, ("train", "evaluate", "generate", "export", "benchmark_generation"))))
        def check(command: tuple[str, list[str]]) -> None:
            name, typed = command
            arguments, _ = take_prompt([argument for argument in typed if not argument.startswith("-")])
            options = parse_arguments(arguments)
            outcomes[is_refused(lambda: resolve(name, check_run(name, options), options.overrides))] += 1

        check()
    assert changes(before, tree(place.folder.parent)) == []
    assert min(outcomes[True], outcomes[False]) > COUNT / 10


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_prompts(checkpoint: Path, tmp_path: Path):
    generator, outcomes = TextGenerator(str(checkpoint), "cpu"), Counter[bool]()
    texts = st.text(max_size=50) | st.sampled_from(nasty_texts(100))
    some_bytes = texts.map(str.encode) | st.binary()
    lines = st.dictionaries(st.just("prompt"), texts | VALUES).map(json.dumps).map(str.encode)
    options = st.sampled_from(list(vars(InferenceConfig())))

    @FUZZ
    @given(some_bytes, st.dictionaries(options, VALUES, max_size=2))
    def check_texts(data: bytes, values: dict[str, Any]) -> None:
        _, prompt = take_prompt([f"prompt={os.fsdecode(data)}"])

        def write() -> None:
            config = replace_checked(InferenceConfig(seed=1), values)
            config = replace(config, max_new_tokens=2, num_return_sequences=1)
            (continuation,) = generator.continuations([prompt], config)
            assert json.loads(json.dumps(vars(continuation)))["prompt"] == prompt

        outcomes[is_refused(write)] += 1

    @FUZZ
    @given(st.sampled_from(["a.txt", "a.jsonl"]), some_bytes | lines)
    def check_files(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        outcomes[is_refused(lambda: read_prompts(tmp_path / name))] += 1

    check_texts()
    check_files()
    assert min(outcomes[True], outcomes[False]) > COUNT / 10


# ---------------------------------------------------------------------------------------------------------------------
# Run folders


def values_of(path: Path) -> Any:
    """The record of a checkpoint, or what each line of another file holds."""
    if path.suffix == ".pth":
        return read_record(path)
    text = path.read_text()
    return [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def places(values: Any, above: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value within others."""
    for key, inner in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*above, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*above, key))


def put(values: Any, place: tuple, new: Any) -> Any:
    """Values with another one at a place; `...` takes out what is there."""
    key, *rest = place
    if rest:
        put(values[key], tuple(rest), new)
    elif new is ...:
        del values[key]
    else:
        values[key] = new
    return values


def level(place: tuple) -> int:
    return max(2, len(place))


def edits(run: Path, *names: str) -> st.SearchStrategy[list[tuple[str, tuple | slice, Any]]]:
    """Files of a run, a place among the values or bytes of each, and what is put there; () stands for no file."""
    kinds = []
    for name in names:
        begin, size = st.integers(0, (run / name).stat().st_size), st.sampled_from([0, 1, 10, 2**30])
        part = st.builds(lambda begin, size: slice(begin, begin + size), begin, size)
        # A value of each level is as likely: the upper ones have few.
        found = sorted([(), *places(values_of(run / name))], key=level)
        place = st.one_of([st.sampled_from([*same]) for _, same in groupby(found, key=level)])
        kinds += [st.tuples(st.just(name), place, st.sampled_from([..., *PLAIN]) | VALUES)] * 4
        kinds += [st.tuples(st.just(name), part, st.binary(max_size=10))]
    return st.lists(st.one_of(kinds), min_size=1, unique_by=lambda edited: edited[0])


def edit(path: Path, place: tuple | slice, new: Any) -> None:
    """Change a file. Its other names keep what it was."""
    if path.suffix == ".pth" and isinstance(place, tuple) and place:
        rewrite_record(path, lambda record: put(record, place, new))
        return
    content, values = bytearray(path.read_bytes()), values_of(path)
    path.unlink()
    if isinstance(place, slice):
        content[place] = new
        path.write_bytes(content)
    elif place:
        path.write_text("\n".join(map(json.dumps, put(values, place, new))))


def compared(run: Path) -> None:
    comparison = Comparison(find_runs([str(run)]))
    as_text(comparison.rows())
    json.dumps(comparison.records())
    page(comparison)


def opened(run: Path) -> None:
    trained = open_model(run)
    trained.build()
    model_card(trained)
    trained.tokenizer_for_text().decode([0])


def completed(name: str, key: str, run: Path) -> None:
    resolve(name, compose(name, [f"{key}={run}"]), [f"{key}={run}"])


def test_run_folders(place: Workspace, tmp_path: Path):
    good, run, outcomes = tmp_path / "good", Path("outputs/runs/gpt2/mutant"), Counter[bool]()
    shutil.copytree(place.folder / "outputs/runs/gpt2/run", good, ignore=shutil.ignore_patterns("step_*", "best_*"))
    shutil.copy(place.folder / "corpus.txt", tmp_path)
    results, checkpoint = edits(good, ABOUT, METRICS), edits(good, "checkpoints/last.pth")
    readers = {
        compared: results,
        opened: checkpoint,
        partial(completed, "generate", "checkpoint"): checkpoint,
        partial(completed, "evaluate", "checkpoint"): checkpoint,
        partial(completed, "train", "resume"): checkpoint,
    }

    @FUZZ
    @given(st.one_of(st.tuples(st.just(read), changed) for read, changed in readers.items()))
    def check(example: tuple[Callable, list]) -> None:
        read, edited = example
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run, copy_function=os.link)
        for name, *change in edited:
            edit(run / name, *change)
        outcomes[is_refused(read, run)] += 1

    with chdir(tmp_path):
        check()
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt", "good", "outputs"}
    assert min(outcomes[True], outcomes[False]) > COUNT / 10
