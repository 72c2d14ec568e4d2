"""Evaluate trained models on a corpus or on tasks: `python evaluate.py checkpoint=... data=...` or `tasks=[...]`."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.cli.script import script
from gpt2.config import DistributedConfig, EvaluateRun
from gpt2.errors import UserError
from gpt2.tracking.evaluations import add_result, earlier_results, settings_of

if TYPE_CHECKING:
    from gpt2.distributed.process_group import ProcessGroup
    from gpt2.evaluate import Evaluator
    from gpt2.model import GPT2Model
    from gpt2.tasks.run import TaskEvaluator


@dataclass
class Evaluation:
    """An evaluation of one model that is ready to run."""

    evaluator: "Evaluator | TaskEvaluator"
    title: str  # the printed line about the data or the tasks
    about: dict[str, Any]  # further entries of its result


@script("evaluate")  # Hydra completes the arguments only of files that contain the text @hydra.main
def main(config: EvaluateRun) -> None:
    """Score each model on one split of a corpus or on tasks, then print and store the figures."""
    import torch

    from gpt2.analysis.evaluations import by_name, model_rows, names_of_models, write_curve
    from gpt2.analysis.tables import as_text
    from gpt2.checkpoint.pretrained import open_model
    from gpt2.distributed.process_group import init_distributed
    from gpt2.ops.cpu_inference import quantize, refuse_quantization
    from gpt2.runtime.device import choose_device, keep_freed_memory
    from gpt2.tracking.loggers import LoggedRun, start_loggers
    from gpt2.tracking.tracker import ExternalLogger, Tracker, now

    keep_freed_memory()
    configs, results, titles, external = [config, *config.others], list[dict[str, Any]](), list[str](), ExternalLogger()
    with init_distributed(DistributedConfig().timeout, config.device, "device") as group, ExitStack() as tracked:
        if config.quantization:
            refuse_quantization(config.quantization, choose_device(config.device), "quantization")
        for one in configs:
            earlier_results(Path(str(one.output)))  # refuses a file without results, before anything is computed
        for one in configs:
            trained = open_model(one.checkpoint)
            model = trained.build()  # before the data, which takes time: a damaged file is an error at once
            if config.quantization:
                quantize(model, config.quantization)
            evaluation = (on_tasks if config.tasks else on_corpus)(one, model, group)
            if one is config:
                if group.is_main:
                    name = f"{trained.experiment} {', '.join(config.tasks) or evaluation.about['split']}"
                    external = start_loggers(config, LoggedRun(name, trained.experiment, "evaluate", settings_of(one)))
                tracked.enter_context(Tracker(external=external))
            figures = evaluation.evaluator.evaluate()
            device, precision = str(evaluation.evaluator.device), evaluation.evaluator.precision.name
            about = {**evaluation.about, "device": device, "precision": precision, "torch": torch.__version__}
            step = trained.record and trained.record["progress"]["step"]
            results.append({**figures, **settings_of(one), "step": step, **about, "time": now()})
            titles.append(evaluation.title)
            if group.is_main:
                add_result(Path(str(one.output)), results[-1])
            if one is not configs[-1]:
                del model, evaluation  # only one model is in memory at a time
        if group.is_main:
            models = f"model  {trained.describe()}" if len(configs) == 1 else names_of_models(results)
            print(models, *dict.fromkeys(titles), f"on     {device}, {config.quantization or precision}", "", sep="\n")
            if len(configs) == 1:
                evaluation.evaluator.print_metrics(figures)
                external.summarize(by_name(figures))
            else:
                head, *rows = model_rows(results)
                print(as_text([head, *rows]))
                external.show_table("evaluations", head, rows)
                if picture := write_curve(results):
                    print(f"\ncurve in {picture}")
    if group.is_main:
        print("", *dict.fromkeys(f"written to {one.output}" for one in configs), *external.where(), sep="\n")


def on_corpus(config: EvaluateRun, model: "GPT2Model", group: "ProcessGroup") -> Evaluation:
    from torch.utils.data import DataLoader

    from gpt2.data.sources import describe_source
    from gpt2.data_loader import identity_collate, load_split
    from gpt2.evaluate import Evaluator
    from gpt2.runtime.device import choose_device

    with group.local_main_first(f"data for {config.checkpoint}"):
        blocks = load_split(config.data, config.split, config.stride)
    if not len(blocks):
        raise UserError(f"data: the {config.split} split has one token, which leaves nothing to predict")
    is_pinned = choose_device(config.device).type == "cuda"  # for asynchronous copies to the GPU
    loader = DataLoader(blocks, batch_size=config.batch_size, collate_fn=identity_collate, pin_memory=is_pinned)
    evaluator = Evaluator(model, loader, config.device, config.precision, group)
    split, stride, tokenizer = blocks.path.stem, blocks.stride, getattr(blocks.tokenizer, "fingerprint", None)
    title = f"data   {describe_source(config.data)}: {split}, windows of {blocks.length} tokens, stride {stride}"
    return Evaluation(evaluator, title, {"split": split, "stride": stride, "tokenizer_fingerprint": tokenizer})


def on_tasks(config: EvaluateRun, model: "GPT2Model", group: "ProcessGroup") -> Evaluation:
    from gpt2.checkpoint.pretrained import open_tokenizer
    from gpt2.tasks.run import TaskEvaluator, Tasks

    tokenizer, context = open_tokenizer(config.data.tokenizer), model.config.context_length
    tasks = Tasks(config.tasks, tokenizer, context, config.batch_size, config.tasks_folder, config.limit, group)
    names, limit = ", ".join(config.tasks), f", limit={config.limit}" if config.limit else ""
    evaluator = TaskEvaluator(model, tasks, config.device, config.precision)
    return Evaluation(evaluator, f"tasks  {names}{limit}", {"tokenizer": config.data.tokenizer})


if __name__ == "__main__":
    main()
