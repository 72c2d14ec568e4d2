"""Synthetic documents of each task, in the layout of its dataset, and a model whose greedy next token is known."""

import json
from pathlib import Path
from typing import Any

import torch

from gpt2.config import TASKS
from gpt2.model import GPT2Model
from gpt2.tasks.table import TASK_TABLE
from gpt2.tokenizer import GPT2Tokenizer
from tests.helpers import noisy_model, tiny_config

CONTEXT = 32  # tokens of the model; some documents are longer


def hellaswag(label: str, ctx_a: str, ctx_b: str, *endings: str) -> dict[str, Any]:
    return {"activity_label": "Baking", "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": [*endings], "label": label, "ind": 3}


def arc(answer: str, labels: str, question: str, *texts: str) -> dict[str, Any]:
    return {"question": question, "choices": {"text": [*texts], "label": [*labels]}, "answerKey": answer}


def winogrande(answer: str, sentence: str, option1: str, option2: str) -> dict[str, Any]:
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}


LONG = "a man opens the door and runs " * 4
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        hellaswag("0", "A man runs.", "he Opens", "the door.", "a café [step] now.", "the  dog [x]  .", "it"),
        hellaswag("3", " [header] To run [title] Open it.", "", "a", "the man", "the", "naïve dogs"),
        hellaswag("1", LONG, "the man", "opens", "opens the door and runs to the dog, then opens it", "a", "the"),
    ],
    "lambada": [
        {"text": "the man opens the door"},
        {"text": f"{LONG}and a dog"},
        {"text": "door"},
        {"text": "a dog, and a line\nthat ends with a space "},
    ],
    "piqa": [
        {"goal": "How to open a door?", "sol1": "Run.", "sol2": "Open it with the dog", "label": 1},
        {"goal": LONG, "sol1": "door", "sol2": "doors", "label": 0},
    ],
    "arc_easy": [
        arc("C", "ABCD", "What runs?", "a door", "the door", "a dog", "it"),
        arc("2", "12345", "What opens?", "dogs", "a door", "a man who runs", "café", "naïve"),
    ],
    "winogrande": [
        winogrande("2", "The man opens the door as the _ runs to it.", "door", "dog"),
        winogrande("1", "_ opens", "the man", "a door"),
        winogrande("1", f"{LONG}as _ runs.", "the dog", "a door that opens"),
    ],
}


def write_tasks(folder: Path, documents: dict[str, list[dict[str, Any]]] = DOCUMENTS) -> Path:
    """Write documents into folders that are laid out as the datasets of the tasks."""
    for name, rows in documents.items():
        place, task = folder / TASKS[name], TASK_TABLE[name]
        place.mkdir(parents=True)
        (place / f"{task.split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        configuration = {"config_name": task.configuration or "default"}
        files = [{"split": task.split, "path": f"{task.split}.jsonl"}]
        (place / "README.md").write_text(
            f"---\n{json.dumps({'configs': [{**configuration, 'data_files': files}]})}\n---\n"
        )
    return folder


def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer.train([json.dumps(DOCUMENTS, ensure_ascii=False)], 320)


def model_that_predicts(tokenizer: GPT2Tokenizer, word: str) -> GPT2Model:
    """A model for which a word of one token is slightly the most likely one everywhere."""
    model = noisy_model(tiny_config(vocab_size=tokenizer.vocab_size, context_length=CONTEXT)).eval()
    (token,) = tokenizer.encode(word)
    with torch.no_grad():
        model.final_norm.bias += 8 * model.token_embedding.weight[token]
    return model
