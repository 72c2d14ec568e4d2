"""Trained models, wherever they come from: one way to name them, to open them, and to write them for others.

A trained model is named by a run folder (its best checkpoint), a checkpoint of ours, a folder that `save_pretrained`
of `transformers` writes, one of OpenAI's (`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`) or OWNER/NAME, both on the
Hugging Face Hub. Weights are read from safetensors only: a pickle, such as `pytorch_model.bin`, can run code.

Opening one reads its description; torch is imported when its weights are asked for.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2 import checkpoint, hugging_face
from gpt2.config import OPENAI, GPT2Config, UserError, is_on_hub
from gpt2.hub import hub_folder
from gpt2.tokenizer import TOKENIZER_FILES, GPT2Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.model import GPT2Model

log = logging.getLogger(__name__)

INSTEAD_OF_HUB = "without a network: a local folder that save_pretrained of transformers wrote, or a checkpoint"


class TrainedModel:
    """A trained model at rest: `CheckpointModel` or `HuggingFaceModel`."""

    source: str  # its name, as `open_model` takes it again
    config: GPT2Config
    tokenizer: GPT2Tokenizer | None  # None if it travels without one
    record: dict[str, Any] | None  # what a checkpoint of ours says besides: `run`, `progress`, ...

    def tensors(self) -> "dict[str, Tensor]":
        """Its weights, fp32, under the names of `GPT2Model`: all of them, in the right shapes.

        Raises:
            UserError: A file is damaged; or tensors are missing, unexpected or misshapen, and then all are named.
        """
        raise NotImplementedError

    def build(self, config: GPT2Config | None = None) -> "GPT2Model":
        """The model with its weights, on the CPU. `config`: its own, or what `following` makes of it.

        Raises:
            UserError: See `tensors`.
        """
        import torch

        from gpt2.model import GPT2Model

        config = config or self.config
        tensors = self.tensors()
        positions = tensors["position_embedding.weight"]
        if config.context_length < len(positions):
            tensors["position_embedding.weight"] = positions[: config.context_length].clone()
        with torch.device("meta"):  # no time spent on weights that are replaced at once
            model = GPT2Model(config)
        model.load_state_dict(tensors, assign=True)
        return model

    def tokenizer_for_text(self) -> GPT2Tokenizer:
        """Its tokenizer; if it travels without one and its vocabulary has the size of GPT-2's, OpenAI's.

        Raises:
            UserError: It has none.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.config.vocab_size != GPT2Config().vocab_size:
            raise UserError(f"checkpoint: {self.source} holds no tokenizer, so it can neither read nor write text")
        log.info("%s holds no tokenizer; by the size of its vocabulary it is GPT-2's, which is taken.", self.source)
        return GPT2Tokenizer.from_hub()

    def describe(self) -> str:
        return self.source if self.record is None else f"{self.source} (step {self.record['progress']['step']:,})"


def open_model(name: str | None) -> TrainedModel:
    """The trained model of that name, see the top of this file; None is the best checkpoint of the latest run.

    Raises:
        UserError: There is none.
    """
    if name is not None and is_on_hub(name):
        return HuggingFaceModel(name, partial(hub_folder, name, instead=INSTEAD_OF_HUB))
    if name is not None and (Path(name) / "config.json").is_file():
        return HuggingFaceModel(name, lambda patterns: Path(name))
    if name is not None and not Path(name).exists():
        raise UserError(f"checkpoint: there is no {name} here, and on the Hub are {', '.join(OPENAI)} and OWNER/NAME")
    return CheckpointModel(checkpoint.find(name))


def open_tokenizer(name: str) -> GPT2Tokenizer:
    """`bytes`, or the tokenizer that a folder holds or a trained model of that name brings.

    Raises:
        UserError: There is none.
    """
    if name == "bytes":
        return GPT2Tokenizer.of_bytes()
    if is_on_hub(name):
        return GPT2Tokenizer.from_hub(name)
    if holds_tokenizer(Path(name)):
        return GPT2Tokenizer.from_folder(name)
    return open_model(name).tokenizer_for_text()


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


FREE = ("dropout", "attention_dropout", "residual_dropout", "initializer_range")  # no weight depends on them


def following(trained: TrainedModel, asked: GPT2Config, explicit: set[str]) -> GPT2Config:
    """The configuration of a model that takes over weights: theirs, but for what may differ and was asked for.

    Dropout may differ, and a shorter context, which leaves out the last positions.

    Args:
        explicit: Fields that were asked for by name. Any other field counts as asked for if it is not the default.

    Raises:
        UserError: What was asked for contradicts the weights; all of it is named.
    """
    weights, default = trained.config, GPT2Config()
    result, faults = replace(weights), []
    for key in (field.name for field in fields(GPT2Config)):
        wanted, has = getattr(asked, key), getattr(weights, key)
        if wanted == has or (wanted == getattr(default, key) and key not in explicit):
            continue
        if key in FREE or (key == "context_length" and wanted < has):
            setattr(result, key, wanted)
        else:
            faults.append(f"model.{key}: {wanted} contradicts train.init_from={trained.source}, which has {has}")
    if faults:
        raise UserError(*faults)
    return result


class CheckpointModel(TrainedModel):
    """What `Trainer.save_checkpoint` wrote."""

    def __init__(self, path: Path):
        self.path = path
        self.source = str(path)

    @cached_property
    def record(self) -> dict[str, Any]:  # type: ignore[override]
        return checkpoint.read_record(self.path)

    @cached_property
    def config(self) -> GPT2Config:  # type: ignore[override]
        return GPT2Config(**self.record["model"])

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer | None:  # type: ignore[override]
        saved = self.record["tokenizer"]
        return saved and GPT2Tokenizer.from_json(saved)

    def tensors(self) -> "dict[str, Tensor]":
        tensors = checkpoint.read_tensors(self.path, "model/")
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        checkpoint.refuse_misfits(self.source, found, checkpoint.shapes_of(self.config))
        return tensors


class HuggingFaceModel(TrainedModel):
    """A GPT-2 in the format of `transformers`, in a folder or on the Hub."""

    record = None

    def __init__(self, source: str, fetch: Callable[[list[str]], Path]):
        """`fetch` returns the folder, once those of its files are there that match some patterns."""
        self.source = source
        self.fetch = fetch

    @cached_property
    def config(self) -> GPT2Config:  # type: ignore[override]
        return hugging_face.read_config(self.fetch([hugging_face.CONFIG]), self.source)

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer | None:  # type: ignore[override]
        folder = self.fetch(TOKENIZER_FILES)
        return GPT2Tokenizer.from_folder(folder) if holds_tokenizer(folder) else None

    def tensors(self) -> "dict[str, Tensor]":
        return hugging_face.read_tensors(self.fetch(hugging_face.WEIGHT_FILES), self.config, self.source)


# ---------------------------------------------------------------------------------------------------------------------
# Out


def export(trained: TrainedModel, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load. It is whole or not there.

    Raises:
        UserError: The model cannot be read, or the folder cannot be written.
    """
    tensors = trained.tensors()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            whole = Path(beside) / folder.name
            whole.mkdir()
            hugging_face.write_folder(whole, trained.config, tensors, trained.tokenizer, model_card(trained))
            whole.rename(folder)
    except OSError as error:
        raise UserError(f"to: cannot write {folder}: {error.strerror}") from error


def model_card(trained: TrainedModel) -> str:
    """The README of an exported folder: what the model is, what it was trained on, for how long, how well."""
    config = "\n".join(f"| {name} | {value} |" for name, value in asdict(trained.config).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# {trained.record["run"]["name"] if trained.record and trained.record["run"] else "GPT-2"}

A GPT-2 for `transformers`:

```python
from transformers import pipeline

write = pipeline("text-generation", "PATH_OF_THIS_FOLDER")
print(write("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```

## Training

{_training(trained.record) if trained.record else f"The weights are those of {trained.source}, unchanged."}

## Architecture

| | |
| --- | --- |
{config}
"""


def _training(record: dict[str, Any]) -> str:
    progress, train, run = record["progress"], record["train"], record["run"] or {}
    loss = "not evaluated" if progress["val_loss"] is None else f"{progress['val_loss']:.4f} nats a token"
    facts = {
        "data": describe_data(run["data"]) if run else "not recorded",
        "steps": f"{progress['step']:,}",
        "tokens": f"{progress['tokens']:,}",
        "hours": f"{progress['seconds'] / 3600:.2f}",
        "validation loss": loss,
        "started from": train.get("init_from") or "random weights",
        **{name: train[name] for name in ("batch_size", "accumulation_steps", "learning_rate", "weight_decay", "seed")},
        "PyTorch": record["torch"],
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def describe_data(data: dict[str, Any]) -> str:
    """The corpus that the fields of a `DataConfig` name, in a few words."""
    names = data["files"] or [name for name in (data["dataset_name"], data["dataset_config"]) if name]
    return ", ".join(names)
