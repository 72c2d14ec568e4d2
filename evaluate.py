"""Score a trained model on a corpus: `python evaluate.py checkpoint=... data=...`."""

import json
import os
import re
from dataclasses import asdict
from math import isfinite
from pathlib import Path

from gpt2.command_line import script
from gpt2.config import EvaluateRun, UserError


@script("evaluate")
def main(config: EvaluateRun) -> None:
    import torch
    from torch.utils.data import DataLoader

    from gpt2.data_loader import as_it_is, load_split
    from gpt2.device import choose_device, keep_freed_memory
    from gpt2.evaluate import Evaluator
    from gpt2.pretrained import describe_data, open_model

    choose_device(config.device)  # refuses a missing one before any work
    keep_freed_memory()
    trained = open_model(config.checkpoint)
    model = trained.build()  # before the data, whose preparation takes time: the weights may be damaged
    blocks = load_split(config.data, config.split, config.stride)
    if not len(blocks):
        raise UserError(f"data: one token in the {config.split} split is too little, there is nothing to predict")
    loader = DataLoader(blocks, batch_size=config.batch_size, collate_fn=as_it_is)

    evaluator = Evaluator(model, loader, config.device, config.precision)
    metrics = evaluator.evaluate()

    split, stride = blocks.path.stem, blocks.stride
    print(f"model  {trained.describe()}")
    print(f"data   {describe_data(asdict(config.data))}: {split}, windows of {blocks.length} tokens, stride {stride}\n")
    evaluator.print_metrics(metrics)

    place = Path(config.output) if config.output else place_of_evaluation(trained.source)
    about = {**asdict(config), "split": split, "stride": stride, "torch": torch.__version__}
    numbers = {key: value if isfinite(value) else None for key, value in metrics.items()}  # JSON knows no infinity
    print(f"\n{'replaced' if place.exists() else 'written to'} {place}")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({**numbers, **about}, indent=2) + "\n", encoding="utf-8")


def place_of_evaluation(source: str) -> Path:
    """Where the result of a trained model belongs: its run folder, if it lies in one."""
    run = Path(source).absolute().parent.parent
    if (run / "metrics.jsonl").is_file():
        return Path(os.path.relpath(run)) / "evaluation.json"
    return Path("outputs/evaluations") / re.sub(r"[^\w.-]+", "_", source.strip("./")) / "evaluation.json"


if __name__ == "__main__":
    main()
