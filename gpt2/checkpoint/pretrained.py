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

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import hugging_face, run_folder
from gpt2.config import GPT2Config
from gpt2.errors import UserError
from gpt2.runtime.hub import OPENAI, hub_folder, is_on_hub
from gpt2.tokenizer import TOKENIZER_FILES, GPT2Tokenizer
from gpt2.validation import replace_checked

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.model import GPT2Model

log = logging.getLogger(__name__)

INSTEAD_OF_HUB = "without a network: a local folder that save_pretrained of transformers wrote, or a checkpoint"


class TrainedModel:
    """A trained model at rest: `CheckpointModel` or `HuggingFaceModel`. Its weights are read when asked for."""

    def __init__(self, source: str, config: GPT2Config, record: dict[str, Any] | None = None):
        """
        Args:
            source: Its name, as `open_model` takes it again.
            record: What a checkpoint of ours says besides: `run`, `progress`, ...
        """
        self.source, self.config, self.record = source, config, record

    def tensors(self) -> "dict[str, Tensor]":
        """Its weights, fp32, under the names of `GPT2Model`: all of them, in the right shapes.

        Raises:
            UserError: A file is damaged; or tensors are missing, unexpected or misshapen, and then all are named.
        """
        raise NotImplementedError

    def read_tokenizer(self) -> GPT2Tokenizer | None:
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer | None:
        """The tokenizer that travels with it; None if there is none.

        Raises:
            UserError: It has tokens that the model does not know.
        """
        tokenizer, known = self.read_tokenizer(), self.config.vocab_size
        if tokenizer and tokenizer.ids_in_use > known:
            raise UserError(f"{self.source}: its tokenizer has {tokenizer.ids_in_use} tokens, its model knows {known}")
        return tokenizer

    @property
    def run(self) -> dict[str, Any] | None:
        """The configuration of the run of `train.py` that trained it; None for any other model."""
        return self.record and self.record["run"]

    def build(self, config: GPT2Config | None = None) -> "GPT2Model":
        """The model with its weights, on the CPU. `config`: its own, or what `finetuning_config` makes of it.

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
            raise UserError(f"{self.source} holds no tokenizer, so nobody knows what its tokens mean")
        log.warning("%s holds no tokenizer; by the size of its vocabulary it is GPT-2's, which is taken.", self.source)
        return GPT2Tokenizer.from_hub()

    def describe(self) -> str:
        return self.source if self.record is None else f"{self.source} (step {self.record['progress']['step']:,})"

    @property
    def experiment(self) -> str:
        """The name of the run that trained it; without one, where it is from."""
        return self.run["name"] if self.run else self.source


def open_model(name: str | Path | None, key: str = "checkpoint") -> TrainedModel:
    """The trained model of that name, see the top of this file; None is the best checkpoint of the latest run.

    `key` is what a user named it by, for the error.

    Raises:
        UserError: There is none, or it is none that can be read.
    """
    if name is None:
        return CheckpointModel(run_folder.find_checkpoint(None, key))
    name, path = str(name), Path(name)
    if is_on_hub(name):
        return HuggingFaceModel(name, partial(hub_folder, name, instead=INSTEAD_OF_HUB))
    if (path / hugging_face.CONFIG).is_file():
        return HuggingFaceModel(name, lambda patterns: path)
    if not name or not path.exists():
        raise UserError(f"{key}: there is no {name!r} here; on the Hub are {', '.join(OPENAI)} and OWNER/NAME")
    if path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{key}: {name} belongs to a Hugging Face folder; name the folder")
    return CheckpointModel(run_folder.find_checkpoint(name, key))


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
    return open_model(name, "data.tokenizer").tokenizer_for_text()


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


FREE = ("dropout", "attention_dropout", "residual_dropout", "initializer_range")  # no weight depends on them


def finetuning_config(trained: TrainedModel, asked: GPT2Config, explicit: set[str]) -> GPT2Config:
    """The configuration of a model that takes over weights: theirs, but for what may differ and was asked for.

    Dropout may differ, and a shorter context, which leaves out the last positions.

    Args:
        explicit: Fields that were asked for by name. Any other field counts as asked for if it is not the default.

    Raises:
        UserError: What was asked for contradicts the weights; all of it is named.
    """
    weights, default = trained.config, GPT2Config()
    result, problems = replace(weights), []
    for key in (field.name for field in fields(GPT2Config)):
        wanted, has = getattr(asked, key), getattr(weights, key)
        if wanted == has or (wanted == getattr(default, key) and key not in explicit):
            continue
        if key in FREE or (key == "context_length" and wanted < has):
            setattr(result, key, wanted)
        else:
            problems.append(f"model.{key}: {wanted} contradicts train.init_from={trained.source}, which has {has}")
    if problems:
        raise UserError(*problems)
    return result


class CheckpointModel(TrainedModel):
    """What `Trainer.save_checkpoint` wrote."""

    def __init__(self, path: Path):
        self.path = path
        record = checkpoint.read_record(path)
        try:
            config = replace_checked(GPT2Config(), record["model"])
            record["run"], record["progress"]["step"], record["tokenizer"]  # all that is asked for later is there
        except (UserError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"checkpoint: {path} is not one that Trainer wrote: {error}") from error
        super().__init__(str(path), config, record)
        self.saved_tokenizer: str | None = record["tokenizer"]

    def read_tokenizer(self) -> GPT2Tokenizer | None:
        return None if self.saved_tokenizer is None else GPT2Tokenizer.from_json(self.saved_tokenizer)

    def tensors(self) -> "dict[str, Tensor]":
        tensors = checkpoint.read_tensors(self.path, "model/")
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        checkpoint.check_tensor_shapes(self.source, found, checkpoint.shapes_of(self.config))
        return {name: tensor.float() for name, tensor in tensors.items()}


class HuggingFaceModel(TrainedModel):
    """A GPT-2 in the format of `transformers`, in a folder or on the Hub."""

    def __init__(self, source: str, fetch: Callable[[list[str]], Path]):
        """`fetch` returns the folder, once those of its files are there that match some patterns."""
        self.fetch = fetch
        super().__init__(source, hugging_face.read_config(fetch([hugging_face.CONFIG]), source))

    def read_tokenizer(self) -> GPT2Tokenizer | None:
        folder = self.fetch([hugging_face.CONFIG, *TOKENIZER_FILES])
        return GPT2Tokenizer.from_folder(folder) if holds_tokenizer(folder) else None

    def tensors(self) -> "dict[str, Tensor]":
        return hugging_face.read_tensors(self.fetch(hugging_face.WEIGHT_FILES), self.config, self.source)


# ---------------------------------------------------------------------------------------------------------------------
# Out


def export(trained: TrainedModel, folder: str | Path) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load. It is whole or not there.

    Raises:
        UserError: The model cannot be read, or the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"to: {folder} is there already; name a folder that is not")
    if trained.tokenizer is None:
        log.warning("%s holds no tokenizer, so neither does what is exported.", trained.source)
    tensors = trained.tensors()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            whole = Path(beside) / folder.name
            whole.mkdir()
            hugging_face.write_folder(whole, trained.config, tensors, trained.tokenizer, model_card(trained))
            whole.rename(folder)
    except OSError as error:
        raise UserError(f"to: cannot write {folder}: {error.strerror or error}") from error


def model_card(trained: TrainedModel) -> str:
    """The README of an exported folder: what the model is, what it was trained on, for how long, how well."""
    config = "\n".join(f"| {name} | {value} |" for name, value in asdict(trained.config).items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# {trained.run["name"] if trained.run else "GPT-2"}

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
    loss = "not evaluated"
    if progress["val_loss"] is not None:
        loss = f"{progress['val_loss']:.4f} nats a token, at step {progress['evaluated_at']:,}"
    facts = {
        "data": describe_data(run["data"]) if run else "not recorded",
        "steps": f"{progress['step']:,}",
        "tokens": f"{progress['tokens']:,}",
        "hours": f"{progress['seconds'] / 3600:.2f}",
        "validation loss": loss,
        "started from": train.get("init_from") or "random weights",
        **{name: train[name] for name in ("batch_size", "accumulation_steps", "learning_rate", "weight_decay", "seed")},
        "PyTorch": record["versions"]["torch"],
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def describe_data(data: dict[str, Any]) -> str:
    """The corpus that the fields of a `DataConfig` name, in a few words."""
    names = data["files"] or [name for name in (data["dataset_name"], data["dataset_config"]) if name]
    return ", ".join(names)
