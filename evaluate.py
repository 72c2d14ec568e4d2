"""Score a trained model on a corpus: `python evaluate.py checkpoint=... data=...`."""

import json
import os
import re
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from gpt2.cli.script import script
from gpt2.config import DistributedConfig, EvaluateRun
from gpt2.errors import UserError


@script("evaluate")
def main(config: EvaluateRun) -> None:
    import torch
    from torch.utils.data import DataLoader

    from gpt2.checkpoint.pretrained import describe_data, open_model
    from gpt2.data_loader import identity_collate, load_split
    from gpt2.distributed.process_group import init_distributed
    from gpt2.evaluate import Evaluator
    from gpt2.ops.cpu_inference import quantize, refuse_int8
    from gpt2.runtime.device import choose_device, keep_freed_memory
    from gpt2.tracking.tracker import ExternalLogger, Tracker
    from gpt2.tracking.wandb_logger import comparable, start_wandb

    keep_freed_memory()
    with init_distributed(DistributedConfig().timeout, config.device, "device") as group:
        if config.quantization:
            refuse_int8(choose_device(config.device), "quantization")
        trained = open_model(config.checkpoint)
        place = Path(config.output) if config.output else place_of_evaluation(trained.source)
        earlier = earlier_results(place)
        model = trained.build()  # before the data, whose preparation takes time: the weights may be damaged
        if config.quantization:
            quantize(model)
        with group.local_main_first("data"):
            blocks = load_split(config.data, config.split, config.stride)
        if not len(blocks):
            raise UserError(f"data: one token in the {config.split} split is too little, there is nothing to predict")
        loader = DataLoader(blocks, batch_size=config.batch_size, collate_fn=identity_collate)

        evaluator = Evaluator(model, loader, config.device, config.precision, group)
        split, stride = blocks.path.stem, blocks.stride
        experiment = trained.experiment
        about_run = {"name": f"{experiment} {split}", "group": experiment, "run_config": comparable(asdict(config))}
        external = start_wandb(config.wandb, job_type="evaluate", **about_run) if group.is_main else ExternalLogger()
        with Tracker(external=external):
            metrics = evaluator.evaluate()
            external.summarize(metrics)

    if not group.is_main:
        return
    form = f", {config.quantization}" if config.quantization else ""
    print(f"model  {trained.describe()}{form}")
    print(f"data   {describe_data(asdict(config.data))}: {split}, windows of {blocks.length} tokens, stride {stride}\n")
    evaluator.print_metrics(metrics)

    about = {
        **{key: value for key, value in asdict(config).items() if key != "wandb"},
        "step": trained.record and trained.record["progress"]["step"],
        "split": split,
        "stride": stride,
        "device": str(evaluator.device),
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    numbers = {key: value if isfinite(value) else None for key, value in metrics.items()}  # JSON knows no infinity
    write(place, {**numbers, **about, "earlier": earlier})
    print(f"\nwritten to {place}")
    if where := external.where():
        print(f"W&B: {where}")


def earlier_results(place: Path) -> list[dict[str, Any]]:
    """What a file of results holds: it goes on in the next one.

    Raises:
        UserError: It is some other file.
    """
    if not place.is_file():
        return []
    try:
        newest = json.loads(place.read_text(encoding="utf-8"))
        return [*newest.pop("earlier"), newest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"output: {place} is there and holds no result of an evaluation; name another file") from error


def write(place: Path, result: dict[str, Any]) -> None:
    """Write a file of results, whole or not at all."""
    beside = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        beside.replace(place)
    except OSError as error:
        raise UserError(f"output: cannot write {place}: {error.strerror}") from error


def place_of_evaluation(source: str) -> Path:
    """Where the result of a trained model belongs: its run folder, if it lies in one."""
    run = Path(source).absolute().parent.parent
    if (run / "metrics.jsonl").is_file():
        return Path(os.path.relpath(run)) / "evaluation.json"
    return Path("outputs/evaluations") / re.sub(r"[^\w.-]+", "_", source.strip("./")) / "evaluation.json"


if __name__ == "__main__":
    main()
