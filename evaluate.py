"""Evaluate a trained model on a corpus: `python evaluate.py checkpoint=... data=...`."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from gpt2.cli.script import script
from gpt2.config import DistributedConfig, EvaluateRun
from gpt2.errors import UserError
from gpt2.tracking.evaluations import add_result, earlier_results


@script("evaluate")  # for shell completion, Hydra looks here for the text @hydra.main
def main(config: EvaluateRun) -> None:
    """Compute loss and perplexity of a trained model on one split; print and store them."""
    import torch
    from torch.utils.data import DataLoader

    from gpt2.checkpoint.pretrained import open_model
    from gpt2.data.sources import describe_source
    from gpt2.data_loader import identity_collate, load_split
    from gpt2.distributed.process_group import init_distributed
    from gpt2.evaluate import Evaluator
    from gpt2.ops.cpu_inference import quantize, refuse_int8
    from gpt2.runtime.device import choose_device, keep_freed_memory
    from gpt2.tracking.loggers import LoggedRun, comparable, start_loggers
    from gpt2.tracking.tracker import ExternalLogger, Tracker

    keep_freed_memory()
    with init_distributed(DistributedConfig().timeout, config.device, "device") as group:
        if config.quantization:
            refuse_int8(choose_device(config.device), "quantization")
        trained = open_model(config.checkpoint)
        output = Path(str(config.output))
        earlier_results(output)  # whatever is no result file is refused before anything is computed
        model = trained.build()  # before the data, whose preparation takes time: the file may be damaged
        if config.quantization:
            quantize(model)
        with group.local_main_first("data"):
            blocks = load_split(config.data, config.split, config.stride)
        if not len(blocks):
            raise UserError(f"data: one token in the {config.split} split is not enough, there is nothing to predict")
        loader = DataLoader(blocks, batch_size=config.batch_size, collate_fn=identity_collate)

        evaluator = Evaluator(model, loader, config.device, config.precision, group)
        split, stride = blocks.path.stem, blocks.stride
        experiment = trained.experiment
        run = LoggedRun(f"{experiment} {split}", experiment, "evaluate", comparable(asdict(config)))
        external = start_loggers(config, run) if group.is_main else ExternalLogger()
        with Tracker(external=external):
            metrics = evaluator.evaluate()
            external.summarize(metrics)

    if not group.is_main:
        return
    quantization = f", {config.quantization}" if config.quantization else ""
    print(f"model  {trained.describe()}{quantization}")
    print(f"data   {describe_source(config.data)}: {split}, windows of {blocks.length} tokens, stride {stride}\n")
    evaluator.print_metrics(metrics)

    about = {
        **{key: value for key, value in asdict(config).items() if key not in ("loggers", "wandb", "mlflow")},
        "step": trained.record and trained.record["progress"]["step"],
        "split": split,
        "stride": stride,
        "device": str(evaluator.device),
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    add_result(output, {**metrics, **about})
    print(f"\nwritten to {output}")
    for line in external.where():
        print(line)


if __name__ == "__main__":
    main()
