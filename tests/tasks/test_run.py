"""Tasks from the command line: `evaluate.py tasks=[...]`, several models at once, and `train.eval_tasks`."""

import json
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint.format import read_tensors
from gpt2.checkpoint.pretrained import open_model
from gpt2.config import TASKS, TrainingConfig
from gpt2.errors import UserError
from gpt2.tasks.run import TaskEvaluator, Tasks
from gpt2.tasks.table import TASK_TABLE, load_questions
from gpt2.tracking.tracker import read_metrics
from gpt2.validation import validate
from tests.conftest import TINY, Workspace
from tests.distributed.test_torchrun import run_ranks
from tests.tasks.documents import DOCUMENTS, write_tasks

ALL = f"tasks=[{','.join(TASKS)}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_each_name_has_a_task():
    assert TASK_TABLE.keys() == TASKS.keys()


def test_prompts_of_each_task(folder):
    pairs = {name: load_questions(name, str(folder), None, "tasks")[0].pairs for name in TASKS}
    assert pairs["hellaswag"][:3] == (
        ("Baking: A man runs. He opens", " the door."),
        ("Baking: A man runs. He opens", " a café now."),
        ("Baking: A man runs. He opens", " the dog  ."),
    )
    _, second, _ = load_questions("hellaswag", str(folder), None, "tasks")
    assert (second.pairs[0], second.answer) == (("Baking:  To run. Open it.", " a"), 3)
    assert pairs["lambada"] == (("the man opens the", " door"),)
    assert pairs["piqa"][0] == ("Question: How to open a door?\nAnswer:", " Run.")
    assert pairs["arc_easy"][3] == ("Question: What runs?\nAnswer:", " it")
    assert [question.answer for question in load_questions("arc_easy", str(folder), None, "tasks")] == [2, 1]
    assert pairs["winogrande"] == tuple((f"The man opens the door as the {o}", " runs to it.") for o in ("door", "dog"))


def test_run_is_evaluated_on_tasks(trained: Workspace, folder, tmp_path):
    (run,) = trained.runs()
    place = [f"tasks_folder={folder}", f"output={tmp_path}/one.json", "device=cpu"]
    done = trained.run("evaluate.py", ALL, *place, "batch_size=3")
    result = json.loads((tmp_path / "one.json").read_text())
    assert result["results"].keys() == TASKS.keys()
    assert not {"data", "split", "stride", "loss"} & result.keys()
    assert (result["step"], result["tasks"], result["limit"]) == (8, [*TASKS], None)
    assert f"perplexity  {result['results']['lambada']['perplexity']:.2e}" in done.stdout
    assert "hellaswag           3  acc_norm" in done.stdout

    model = open_model(run)
    tasks = Tasks([*TASKS], model.tokenizer_for_text(), model.config.context_length, folder=str(folder))
    evaluator = TaskEvaluator(model.build(), tasks, "cpu")
    metrics = evaluator.evaluate()
    for name, figures in metrics["results"].items():
        assert figures == pytest.approx(result["results"][name], rel=1e-5)
    evaluator.print_metrics(metrics)


def test_every_checkpoint_of_a_run_in_one_table_and_curve(trained: Workspace, folder, tmp_path):
    (run,) = trained.runs()
    output = f"output={tmp_path}/all.json"
    done = trained.run("evaluate.py", "all_checkpoints=true", output)
    newest = json.loads((tmp_path / "all.json").read_text())
    results = [*newest.pop("earlier"), newest]
    assert [result["step"] for result in results] == [4, 8]
    for result in results:
        assert f"step_{result['step']:08}.pth  {result['step']:4}  {result['loss']:.4f}" in done.stdout
    assert f"models 2 of {run.relative_to(trained.folder)}/checkpoints" in done.stdout
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")

    names = f"checkpoint=[{run}/checkpoints/step_00000004.pth,{run}]"
    done = trained.run("evaluate.py", names, "tasks=[lambada,piqa]", f"tasks_folder={folder}", "limit=1", output)
    assert [line.split()[:2] for line in done.stdout.splitlines() if ".pth" in line] == [
        ["step_00000004.pth", "4"],
        ["best_model.pth", "8"],
    ]
    assert "lambada perplexity" in done.stdout
    assert " ± n/a" in done.stdout  # the standard error of one document
    piqa = json.loads((tmp_path / "all.json").read_text())["results"]["piqa"]
    assert (piqa["documents"], piqa["acc_stderr"]) == (1, None)  # JSON has no NaN
    assert (tmp_path / "all_tasks.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (
            ["tasks=[helaswag,mmlu]", "limit=0"],
            ["limit: 0 is not a whole number of", "tasks: helaswag is none of ", "tasks: mmlu is none of hellaswag"],
        ),
        (["tasks=[piqa]", "tasks_folder=corpus.txt"], ["tasks_folder: there is no folder corpus.txt/baber/piqa"]),
        (["tasks=[piqa]", "stride=3"], ["stride: has no effect on tasks=[...], which need no corpus"]),
        (["limit=3"], ["tasks: is empty, but limit is only for tasks=[...]"]),
        (["checkpoint=[latest,[a]]"], ["is neither a name nor a list of names"]),
        (["checkpoint=nowhere", "all_checkpoints=true"], ["all_checkpoints: nowhere is no run folder with a"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistake_is_one_line_before_any_work(trained: Workspace, arguments, complaints):
    lines = trained.run("evaluate.py", *arguments, expect=2).stderr.splitlines()
    assert len(lines) == len(complaints)
    assert all(complaint in line for complaint, line in zip(complaints, lines, strict=True))
    assert all("hellaswag is the nearest" in line for line in lines if "helaswag" in line)


def test_mistake_in_training_is_one_line(workspace: Workspace):
    (problem,) = validate(TrainingConfig(eval_tasks=["arc"]), "train.")
    assert problem.startswith("train.eval_tasks: arc is none of hellaswag, lambada, piqa, arc_easy, winogrande")
    done = workspace.run("train.py", *TINY, "train.eval_tasks=[piqa]", expect=2)  # without a network
    assert done.stderr.splitlines()[-1].endswith("train.eval_tasks_folder=FOLDER with baber/piqa in it")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"goal": None}, "document 2 of .*/baber/piqa .validation. cannot be read"),
        ({"label": 2}, "document 2 of .*: none of its 2 choices is the answer"),
        ({"label": -1}, "none of its 2 choices is the answer"),
    ],
)
def test_document_of_another_kind_is_named(tmp_path, changes, complaint):
    first, second = DOCUMENTS["piqa"]
    write_tasks(tmp_path, {"piqa": [first, {**second, **changes}]})
    with pytest.raises(UserError, match=complaint):
        load_questions("piqa", str(tmp_path), None, "tasks")


def test_dataset_of_another_task_is_named(tmp_path):
    write_tasks(tmp_path, {"piqa": [{"text": "a"}]})
    with pytest.raises(UserError, match=r"tasks: document 1 of .* has no column 'goal'"):
        load_questions("piqa", str(tmp_path), None, "tasks")


def test_training_scores_tasks_without_changing_its_result(trained: Workspace, workspace: Workspace, folder):
    tasks = ["train.eval_tasks=[lambada,winogrande]", f"train.eval_tasks_folder={folder}", "train.eval_tasks_limit=2"]
    (plain,), scored = trained.runs(), workspace.folder / "scored"
    workspace.environment["GPT2_FAULT"] = "exit@6"
    done = workspace.run("train.py", *TINY, *tasks, f"hydra.run.dir={scored}", "train.keep_checkpoints=9", expect=7)
    del workspace.environment["GPT2_FAULT"]
    workspace.run("train.py", f"resume={scored}")

    names = ["val/lambada", "val/lambada_perplexity", "val/winogrande"]
    records = [record for record in read_metrics(scored / "metrics.jsonl") if "val/loss" in record]
    models = [open_model(scored / "checkpoints" / f"step_{step:08}.pth") for step in (4, 8)]
    loaded = Tasks(["lambada", "winogrande"], models[0].tokenizer_for_text(), 32, folder=str(folder), limit=2)
    for model, record in zip(models, records, strict=True):
        results = TaskEvaluator(model.build(), loaded, "cpu").evaluate()["results"]
        expected = [results["lambada"]["acc"], results["lambada"]["perplexity"], results["winogrande"]["acc"]]
        assert [record[name] for name in names] == pytest.approx(expected, rel=1e-5)
    assert f"lambada {records[0][names[0]]:.3f}  winogrande {records[0][names[2]]:.3f}  (best so far)" in done.stdout
    weights = [read_tensors(run / "checkpoints" / "last.pth", "model/") for run in (plain, scored)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_folder_without_a_readme(tmp_path, folder):
    for name, place in (("arc_easy", "ARC-Easy"), ("lambada", "data")):
        target = tmp_path / TASKS[name] / place
        target.mkdir(parents=True)
        (source,) = (folder / TASKS[name]).glob("*.jsonl")
        (target / f"{source.stem}-00000-of-00001.jsonl").write_bytes(source.read_bytes())
        assert load_questions(name, str(tmp_path), 2, "tasks") == load_questions(name, str(folder), 2, "tasks")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_share_the_documents(workspace: Workspace, folder, strategy):
    tasks = [f"train.eval_tasks=[{','.join(TASKS)}]", f"train.eval_tasks_folder={folder}"]
    workspace.run("train.py", *TINY, *tasks, "hydra.run.dir=one")
    run_ranks(workspace, 2, *TINY, *tasks, "hydra.run.dir=two", f"distributed.strategy={strategy}")
    one, two = (read_metrics(workspace.folder / run / "metrics.jsonl")[-1] for run in ("one", "two"))
    names = [name for name in one if name.startswith("val/")]
    assert len(names) > 8
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
    command = [ALL, f"tasks_folder={folder}", "checkpoint=two"]
    workspace.run("evaluate.py", *command, "output=one.json")
    run_ranks(workspace, 2, *command, "output=two.json", script="evaluate.py")
    one, two = (json.loads((workspace.folder / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert one == two  # to the last bit
