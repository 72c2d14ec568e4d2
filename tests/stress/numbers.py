"""NaN and infinity in training."""

import math
import random
import re
import shutil
from pathlib import Path

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.format import nonfinite_names
from gpt2.tracking.tracker import read_metrics
from tests.stress.table import Row, complain
from tests.stress.warm import SMALL, Place


def not_finite(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Inject NaN and infinity into loss, gradient or weight: never saved, and the run resumes intact."""
    skip, limit = "train.on_nonfinite=skip", "train.nonfinite_limit=3"
    cases: list[tuple[str, list[str], int]] = [
        ("nan_loss@9", [], 3),
        ("inf_loss@12", [], 3),
        ("nan_gradient@1", [], 3),
        ("inf_gradient@23", [], 3),
        ("nan_weight@17", [], 3),
        ("nan_loss@9", [skip], 0),
        ("inf_loss@12,nan_loss@13", [skip], 0),
        ("nan_gradient@4-6", [skip, limit], 0),
        ("inf_gradient@40", [skip], 0),
        ("nan_gradient@4-7", [skip, limit], 3),
        ("nan_weight@17", [skip, limit], 3),
        ("inf_gradient@9", ["train.precision=fp16"], 0),
    ]
    poisoned: list[str] = []
    for number, (fault, options, code) in enumerate(cases[:count]):
        place = Place(folder / f"{number}", {"GPT2_FAULT": fault})
        ended = place.run("train.py", *SMALL, *options)
        poisoned += complain(place, ended, {code})
        if re.search(r"step \d+ \(batch", ended.output) is None:
            poisoned.append(f"{fault}: no word of it: {ended.output[-300:]}")
        for run in place.runs():
            for path in run.glob("checkpoints/*.pth"):
                poisoned += [f"{fault}: {path.name} {name}" for name in nonfinite_names(checkpoint.read_tensors(path))]
            losses = [record["train/loss"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
            poisoned += [f"{fault}: logged {loss}" for loss in losses if loss is not None and not 0.1 < loss < math.inf]
        place.environment = {"GPT2_FAULT": ""}
        poisoned += complain(place, place.run("train.py", *SMALL, *options), {0})
        shutil.rmtree(place.folder)
    return [
        Row("NaN or infinity in loss, gradient, weights", len(cases[:count]), "poisoned checkpoints or logs", poisoned)
    ]
