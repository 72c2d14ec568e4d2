"""Evaluation of a model on tasks: a trained model, or one in training at each of its evaluations."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
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
            self.questions = {name: load_questions(name, folder, limit, key) for name in names}
        self.scorer = TaskScorer([*chain(*self.questions.values())], tokenizer, context_length, batch_size)

    def evaluate(
        self, model: GPT2Model, autocast: AbstractContextManager, on_batch: Callable[[int, int], bool | None]
    ) -> Figures:
        """The figures of each task; empty if interrupted.

        Args:
            on_batch: See `TaskScorer.likelihoods`.
        """
        likelihoods = self.scorer.likelihoods(model, autocast, on_batch, self.group)
        if likelihoods is None:
            return {}
        of_all = iter(likelihoods)
        return {
            name: figures(TASK_TABLE[name].metrics, questions, [*islice(of_all, len(questions))])
            for name, questions in self.questions.items()
        }


class TaskEvaluator:
    """Figures of a model on tasks."""

    def __init__(self, model: GPT2Model, tasks: Tasks, device: str = "cuda", precision: str = "auto"):
        """See `gpt2.evaluate.Evaluator` for `device` and `precision`."""
        self.device = cuda_or_fallback(device)
        self.precision = agreed_precision(auto_without_training(precision, self.device), self.device, tasks.group)
        self.model, self.tasks = model.to(self.device), tasks

    def evaluate(self) -> dict[str, Figures]:
        """The figures of each task under `results`. Shows the progress."""
        with track("Evaluating", unit="batches") as advance:
            autocast = self.precision.autocast()
            results = self.tasks.evaluate(self.model, autocast, lambda batch, batches: advance(batch + 1, batches))
        return {"results": results}

    def print_metrics(self, metrics: dict[str, Figures]) -> None:
        """Print a table with one row per figure."""
        print(as_text(task_rows(metrics["results"])))


class TaskMetrics(Callback):
    """Adds the figures of tasks to each evaluation: the headline as `val/hellaswag`, others as `val/hellaswag_acc`.

    The ranks share the documents, so each of them needs this callback.
    """

    def __init__(self, config: TrainingConfig, tokenizer: GPT2Tokenizer, context_length: int, group: ProcessGroup):
        folder, limit = config.eval_tasks_folder, config.eval_tasks_limit
        self.tasks = Tasks(
            config.eval_tasks, tokenizer, context_length, config.batch_size, folder, limit, group, "train.eval_tasks"
        )

    def extend_evaluation(self, trainer: Any, metrics: Metrics) -> None:
        def on_batch(batch: int, batches: int) -> bool:
            for callback in trainer.callbacks:
                callback.on_validation_batch(trainer, batch, batches)
            return trainer.interrupted_by is None

        results = self.tasks.evaluate(trainer.model, trainer.plan.precision.autocast(), on_batch)
        for name, result in results.items():
            headline, *others = TASK_TABLE[name].metrics
            metrics[f"val/{name}"] = result[headline]
            metrics |= {f"val/{name}_{other}": result[other] for other in others}
