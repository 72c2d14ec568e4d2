"""The tasks: the dataset of each, and how a document becomes a question.

To add a task, write a function from a document to a `Question`, enter it in `TASK_TABLE`, and enter the names of the
task and of its dataset in `gpt2.config.TASKS`.

Prompts and figures are those of EleutherAI's lm-eval, without examples in the prompt (zero-shot), so that they compare
with published ones. A test compares them with lm-eval, document by document.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpt2.config import TASKS
from gpt2.data.hub_datasets import load_tables
from gpt2.errors import UserError, one_line

Document = dict[str, Any]  # a row of a dataset
Pair = tuple[str, str]  # context and continuation


@dataclass(frozen=True)
class Question:
    """A question about a document: the most likely of several continuations, or the likelihood of one."""

    pairs: tuple[Pair, ...]
    answer: int = 0  # index of the right pair
    lengths: tuple[int, ...] = ()  # characters of the choices, for `acc_norm`; empty if the task does not have it


@dataclass(frozen=True)
class Task:
    """A dataset, whose name is in `gpt2.config.TASKS`, and how a document of it becomes a question."""

    configuration: str | None
    split: str
    read: Callable[[Document], Question]
    metrics: tuple[str, ...]  # names in `gpt2.tasks.scores.METRICS`, the headline figure first


def choose(context: str, choices: list[str], answer: int) -> Question:
    """Which choice follows the context, after a space?

    As in lm-eval, `acc_norm` divides by the number of characters without that space; nanochat and llm.c divide by the
    number of tokens.
    """
    pairs = tuple((context, " " + choice) for choice in choices)
    return Question(pairs, answer, tuple(len(choice) for choice in choices))


def hellaswag(document: Document) -> Question:
    context = document["activity_label"] + ": " + document["ctx_a"] + " " + document["ctx_b"].capitalize()
    endings = [_without_markup(ending) for ending in document["endings"]]
    return choose(_without_markup(context), endings, int(document["label"]))


def _without_markup(text: str) -> str:
    """A text of WikiHow without `[title]` and other words in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def lambada(document: Document) -> Question:
    """What is the last word? As OpenAI scored GPT-2: without a list of candidates or of stop words."""
    context, _, word = document["text"].rpartition(" ")
    return Question(((context, f" {word}"),))


def piqa(document: Document) -> Question:
    return choose(_asked(document["goal"]), [document["sol1"], document["sol2"]], document["label"])


def arc(document: Document) -> Question:
    texts, labels = document["choices"]["text"], document["choices"]["label"]
    return choose(_asked(document["question"]), texts, labels.index(document["answerKey"]))


def _asked(question: str) -> str:
    return "Question: " + question + "\nAnswer:"


def winogrande(document: Document) -> Question:
    """Which option makes the rest of the sentence likelier (partial evaluation, Trinh and Le, 2018)?"""
    before, blank, after = document["sentence"].partition("_")
    if not blank:
        raise ValueError("no _ in the sentence")
    options = (document["option1"], document["option2"])
    pairs = tuple((before + option, f" {after.strip()}") for option in options)
    return Question(pairs, ["1", "2"].index(document["answer"]))


TASK_TABLE = {
    "hellaswag": Task(None, "validation", hellaswag, ("acc_norm", "acc")),
    "lambada": Task("default", "test", lambada, ("acc", "perplexity")),
    "piqa": Task(None, "validation", piqa, ("acc_norm", "acc")),
    "arc_easy": Task("ARC-Easy", "test", arc, ("acc_norm", "acc")),
    "winogrande": Task("winogrande_xl", "validation", winogrande, ("acc",)),
}


@cache
def load_questions(
    name: str, folder: str | None = None, limit: int | None = None, key: str = "tasks"
) -> list[Question]:
    """The questions of a task, in the order of its documents.

    Args:
        folder: A folder with the dataset under its name on the Hub; None: from the Hub or its cache.
        limit: The number of documents, from the first; None: all.
        key: The configuration key of the task, for error messages.

    Raises:
        UserError: The dataset cannot be reached or read, or lacks a column that the task needs.
    """
    task, dataset = TASK_TABLE[name], TASKS[name]
    source, configuration = dataset if folder is None else f"{folder}/{dataset}", task.configuration
    if folder is not None and not Path(source, "README.md").exists():  # a README.md would list the configurations
        inner, configuration = Path(source, str(configuration)), None
        source = str(inner) if inner.is_dir() else source
    (table,), _ = load_tables(source, configuration, [task.split], key=key)
    assert table is not None
    questions: list[Question] = []
    try:
        for document in table.select(range(min(len(table), limit or len(table)))):
            question = task.read(document)
            if not 0 <= question.answer < len(question.pairs):
                raise ValueError(f"none of its {len(question.pairs)} choices is the answer")
            questions.append(question)
    except (KeyError, ValueError, TypeError, AttributeError, OSError, SystemError) as error:
        number, kind = len(questions) + 1, "has no column" if isinstance(error, KeyError) else "cannot be read:"
        raise UserError(f"{key}: document {number} of {source} ({task.split}) {kind} {one_line(error)}") from error
    if not questions:
        raise UserError(f"{key}: {source} ({task.split}) holds no document")
    return questions
