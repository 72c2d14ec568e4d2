"""Log-likelihoods match `transformers` one sequence at a time, and lm-eval where it is installed."""

import math
from contextlib import nullcontext
from pathlib import Path
from statistics import stdev

import pytest
import torch

from gpt2.config import TASKS
from gpt2.tasks.scores import Likelihood, TaskScorer, encode_pairs, figures, pack
from gpt2.tasks.table import TASK_TABLE, Question, load_questions
from gpt2.tokenizer import GPT2Tokenizer
from tests.helpers import transformers_twin
from tests.tasks.documents import CONTEXT, model_that_predicts, tokenizer, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def words() -> GPT2Tokenizer:
    return tokenizer()


@pytest.fixture(scope="module")
def model(words):
    return model_that_predicts(words, " door")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def by_transformers(twin, words: GPT2Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """The reference: the log-likelihood of a continuation from all logits of one sequence."""
    whole = words.encode(context + continuation)
    before = words.encode(context.rstrip(" "))
    if not before:
        before, whole = [words.eos_token_id], [words.eos_token_id, *whole]
    scored = len(whole) - len(before)
    whole = whole[-(CONTEXT + 1) :]
    with torch.no_grad():
        log_probabilities = twin(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    places = range(len(whole) - 1 - scored, len(whole) - 1)
    total = sum(log_probabilities[place, whole[place + 1]].item() for place in places)
    return total, all(log_probabilities[place].argmax().item() == whole[place + 1] for place in places)


@pytest.mark.parametrize("name", TASKS)
def test_likelihoods_match_transformers_at_any_batch_size(folder, words, model, name):
    questions, twin = load_questions(name, str(folder), None, "tasks"), transformers_twin(model).eval()
    expected = [[by_transformers(twin, words, *pair) for pair in question.pairs] for question in questions]
    for size in (1, 2, 100):
        found = TaskScorer(questions, words, CONTEXT, size).likelihoods(model, nullcontext())
        assert found is not None
        for ours, theirs in zip(found, expected, strict=True):
            assert [one.log for one in ours] == pytest.approx([log for log, _ in theirs], abs=1e-4)
            assert [one.is_greedy for one in ours] == [is_greedy for _, is_greedy in theirs]
    if name == "lambada":
        assert [is_greedy for ((_, is_greedy),) in expected] == [True, False, True, False]


def test_choices_share_the_beginning_of_their_row(words):
    texts = encode_pairs(words, [("the man opens", f" {choice}") for choice in ("a door", "a dog", "it")], 16)
    (row,) = pack(texts, first=5, longest=16)
    shared = len(words.encode("the man opens"))
    assert row.branches[:shared] == [0] * shared
    assert len(row.ids) == shared + sum(scored - 1 for _, scored in texts)
    assert row.owners == [5 + number for number, (_, scored) in enumerate(texts) for _ in range(scored)]
    assert row.targets == [token for tokens, scored in texts for token in tokens[-scored:]]
    assert len(pack(texts, 0, longest=len(texts[0][0]))) > 1  # a row is never longer than the model's context


def test_interrupted_evaluation_has_no_result(folder, words, model):
    scorer = TaskScorer(load_questions("piqa", str(folder), None, "tasks"), words, CONTEXT, 1)
    assert scorer.likelihoods(model, nullcontext(), lambda batch, batches: batch < batches - 1) is None


def test_figures():
    choices = Question((("a", " b"), ("a", " cd")), answer=1, lengths=(1, 2))
    likelihoods = [[Likelihood(log, False) for log in logs] for logs in ((-2.0, -3.0), (-1.0, -3.0), (-9.0, -3.0))]
    found = figures(("acc", "acc_norm"), [choices] * 3, likelihoods)
    assert (found["acc"], found["acc_norm"], found["documents"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3), 3)
    assert found["acc_stderr"] == pytest.approx(stdev([0, 0, 1]) / math.sqrt(3))

    words = [[Likelihood(-1.0, True)], [Likelihood(-3.0, False)]]
    found = figures(("acc", "perplexity"), [Question((("a", " b"),))] * 2, words)
    assert (found["acc"], found["perplexity"]) == (0.5, pytest.approx(math.exp(2)))
    assert found["perplexity_stderr"] == pytest.approx(math.exp(2) * stdev([1, 3]) / math.sqrt(2))
    assert math.isnan(figures(("acc",), [choices], likelihoods[:1])["acc_stderr"])
    empty = Question((("a", " "), ("a", " cd")), answer=1, lengths=(0, 2))  # a choice without characters never wins
    assert figures(("acc_norm",), [empty], likelihoods[:1])["acc_norm"] == 1


# The files of lm-eval's tasks
THEIRS = {
    "hellaswag": "hellaswag/hellaswag",
    "lambada": "lambada/lambada_openai",
    "piqa": "piqa/piqa",
    "arc_easy": "arc/arc_easy",
    "winogrande": "winogrande/default",
}


@pytest.mark.slow
def test_results_match_lm_eval_document_by_document(folder, words, model, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    transformers_twin(model).save_pretrained(tmp_path / "model")
    words.to_folder(tmp_path / "model", CONTEXT)
    files = []
    for name, file in THEIRS.items():  # lm-eval's tasks, with our documents
        files.append(tmp_path / f"{name}.yaml")
        splits = {"training_split", "validation_split", "test_split"} - {f"{TASK_TABLE[name].split}_split"}
        lines = [f"include: {Path(lm_eval.__file__).parent / 'tasks' / file}.yaml", f"task: {name}"]
        lines += [f"dataset_path: {folder / TASKS[name]}", *(f"{split}: null" for split in splits)]
        files[-1].write_text("\n".join(lines))
    lm = HFLM(pretrained=str(tmp_path / "model"), device="cpu", batch_size=2)
    theirs = lm_eval.simple_evaluate(lm, tasks=[str(file) for file in files], bootstrap_iters=2)

    for name in TASKS:
        questions = load_questions(name, str(folder), None, "tasks")
        likelihoods = TaskScorer(questions, words, CONTEXT, 3).likelihoods(model, nullcontext())
        metrics = TASK_TABLE[name].metrics
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        for question, ours, sample in zip(questions, likelihoods, samples, strict=True):
            answers = [response for (response,) in sample["resps"]]
            assert [one.log for one in ours] == pytest.approx([log for log, _ in answers], abs=1e-3)
            assert [one.is_greedy for one in ours] == [is_greedy for _, is_greedy in answers]
            found = figures(metrics, [question], [ours])
            assert [found[m] for m in metrics if m != "perplexity"] == [sample[m] for m in metrics if m != "perplexity"]
        found, expected = figures(metrics, questions, likelihoods), theirs["results"][name]
        assert [found[m] for m in metrics] == pytest.approx([expected[f"{m},none"] for m in metrics], rel=1e-4)
        for metric in set(metrics) - {"perplexity"}:  # lm-eval computes its standard error by resampling
            assert found[f"{metric}_stderr"] == pytest.approx(expected[f"{metric}_stderr,none"])
