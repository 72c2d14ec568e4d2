"""Evaluation of a model on tasks, by itself or as a part of each validation of a training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from gpt2.analysis.evaluations import task_rows
from gpt2.analysis.tables import as_text
from gpt2.config import TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import GPT2Model
from gpt2.runtime.console import track
from gpt2.runtime.device import auto_without_training, cuda_or_fallback
from gpt2.tasks.scores import TaskScorer, figures
from gpt2.tasks.table import TASK_TABLE, load_questions
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.training.callbacks import Callback, Metrics
from gpt2.training.compile import agreed_precision

Figures = dict[str, dict[str, float]]  # of each task: see `gpt2.tasks.scores.figures`


class Tasks:
    """Tasks as batches for models with one tokenizer and context length."""

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: GPT2Tokenizer,
        context_length: int,
        batch_size: int = 8,
        folder: str | None = None,
        limit: int | None = None,
        group: ProcessGroup | None = None,
        key: str = "tasks",
    ):
        """
        Args:
            names: Of `gpt2.config.TASKS`.
            batch_size: Documents in a forward pass; the figures do not depend on it.
            folder, limit, key: See `gpt2.tasks.table.load_questions`.
            group: The ranks that share the documents.

        Raises:
            UserError: See `load_questions`.
        """
        self.group = group or ProcessGroup()
        with self.group.local_main_first(key):
            questions = {name: load_questions(name, folder, limit, key) for name in names}
        self.scorers = {
            name: TaskScorer(found, tokenizer, context_length, batch_size) for name, found in questions.items()
        }

    def evaluate(
        self, model: GPT2Model, autocast: AbstractContextManager, on_batch: Callable[[int, int], bool]
    ) -> Figures | None:
        """The figures of each task.

        Args:
            on_batch: As in `TaskScorer.likelihoods`, but the batches of all tasks are counted.
        """
        results: Figures = {}
        done, total = 0, sum(len(scorer.batches) for scorer in self.scorers.values())

        def on_batch_of_task(batch: int, _batches: int) -> bool:
            return on_batch(done + batch, total)

        for name, scorer in self.scorers.items():
            likelihoods = scorer.likelihoods(model, autocast, on_batch_of_task, self.group)
            if likelihoods is None:
                return None
            results[name] = figures(TASK_TABLE[name].metrics, scorer.questions, likelihoods)
            done += len(scorer.batches)
        return results


class TaskEvaluator:
    """Figures of a model on tasks."""

    def __init__(self, model: GPT2Model, tasks: Tasks, device: str = "cuda", precision: str = "auto"):
        """`device` and `precision` are as of `gpt2.evaluate.Evaluator`."""
        self.device = cuda_or_fallback(device)
        self.precision = agreed_precision(auto_without_training(precision, self.device), self.device, tasks.group)
        self.model, self.tasks = model.to(self.device), tasks

    def evaluate(self) -> dict[str, Figures]:
        """The figures of each task under `results`, and their progress on the way."""
        with track("Evaluating", unit="batches") as advance:

            def on_batch(batch: int, batches: int) -> bool:
                advance(batch + 1, batches)
                return True

            return {"results": self.tasks.evaluate(self.model, self.precision.autocast(), on_batch) or {}}

    def print_metrics(self, metrics: dict[str, Figures]) -> None:
        """Print a table with a row for each figure."""
        print(as_text(task_rows(metrics["results"])))


class TaskMetrics(Callback):
    """Adds the figures of tasks to each evaluation: `val/hellaswag` is the headline, others `val/hellaswag_acc`.

    Every rank has this callback, because they share the documents.
    """

    def __init__(self, config: TrainingConfig, tokenizer: GPT2Tokenizer, context_length: int, group: ProcessGroup):
        names, folder, limit = config.eval_tasks, config.eval_tasks_folder, config.eval_tasks_limit
        key = "train.eval_tasks"
        self.tasks = Tasks(names, tokenizer, context_length, config.batch_size, folder, limit, group, key)

    def extend_evaluation(self, trainer: Any, metrics: Metrics) -> None:
        def on_batch(batch: int, batches: int) -> bool:
            for callback in trainer.callbacks:
                callback.on_validation_batch(trainer, batch, batches)
            return trainer.interrupted_by is None

        results = self.tasks.evaluate(trainer.model, trainer.plan.precision.autocast(), on_batch) or {}
        for name, result in results.items():
            headline, *others = TASK_TABLE[name].metrics
            metrics[f"val/{name}"] = result[headline]
            metrics |= {f"val/{name}_{other}": result[other] for other in others}
