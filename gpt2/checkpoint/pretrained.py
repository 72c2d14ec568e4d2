"""Open trained models from any source by name, and export them for `transformers`.

A name is a run folder (its best checkpoint), `latest` for the latest run, a checkpoint file, a folder written by
`save_pretrained` of `transformers`, or a model on the Hugging Face Hub: one of OpenAI's (`gpt2`, `gpt2-medium`,
`gpt2-large`, `gpt2-xl`) or OWNER/NAME. Weights are read from safetensors only: a pickle, such as `pytorch_model.bin`,
can run code.

Opening a model reads only its configuration. Its weights, and torch, are loaded when they are needed.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import hugging_face, run_folder
from gpt2.checkpoint.record import read_record
from gpt2.config import ExportRun, GPT2Config
from gpt2.errors import UserError
from gpt2.runtime.files import atomic_folder
from gpt2.runtime.hub import OPENAI, hub_folder, is_on_hub
from gpt2.tokenizer import TOKENIZER_FILES, GPT2Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.model import GPT2Model

log = logging.getLogger(__name__)

OFFLINE_MODELS = "without a network, use a folder written by save_pretrained of transformers, or a checkpoint"


class TrainedModel:
    """A trained model on disk: a `CheckpointModel` or a `HuggingFaceModel`."""

    def __init__(self, source: str, config: GPT2Config, record: dict[str, Any] | None = None):
        """
        Args:
            source: The name of the model; `open_model` accepts it again.
            record: The record of a checkpoint (`run`, `progress`, ...); None for other models.
        """
        self.source, self.config, self.record = source, config, record

    def tensors(self) -> "dict[str, Tensor]":
        """Read the weights in fp32, with the names of `GPT2Model`.

        Raises:
            UserError: A file is damaged, or tensors are missing, unexpected or misshapen; all of them are named.
        """
        raise NotImplementedError

    def read_tokenizer(self) -> GPT2Tokenizer | None:
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer | None:
        """The tokenizer that is stored with the model; None if there is none.

        Raises:
            UserError: The tokenizer has more tokens than the model.
        """
        tokenizer, limit = self.read_tokenizer(), self.config.vocab_size
        if tokenizer and tokenizer.ids_in_use > limit:
            raise UserError(f"{self.source}: its tokenizer has {tokenizer.ids_in_use} tokens, its model only {limit}")
        return tokenizer

    def tokenizer_for_text(self) -> GPT2Tokenizer:
        """Return the stored tokenizer, or GPT-2's if there is none and the vocabulary has the size of GPT-2's.

        Raises:
            UserError: There is no tokenizer, and the vocabulary has another size.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.config.vocab_size != GPT2Config().vocab_size:
            raise UserError(f"{self.source} holds no tokenizer, so its tokens cannot be turned into text")
        log.warning("%s holds no tokenizer; GPT-2's is used, because the vocabularies have the same size.", self.source)
        return GPT2Tokenizer.from_hub()

    @property
    def run(self) -> dict[str, Any] | None:
        """The configuration of the `train.py` run that trained the model; None for other models."""
        return self.record and self.record["run"]

    @property
    def experiment(self) -> str:
        """The name of the run that trained the model; for other models, the source."""
        return self.run["name"] if self.run else self.source

    def describe(self) -> str:
        return self.source if self.record is None else f"{self.source} (step {self.record['progress']['step']:,})"

    def build(self, config: GPT2Config | None = None) -> "GPT2Model":
        """Build the model with its weights, on the CPU.

        Args:
            config: The result of `finetuning_config`; None: the model's own. With a shorter context, the last position
                embeddings are dropped.

        Raises:
            UserError: See `tensors`.
        """
        from gpt2.model import meta_model

        config = config or self.config
        tensors = self.tensors()
        positions = tensors["position_embedding.weight"]
        if config.context_length < len(positions):
            tensors["position_embedding.weight"] = positions[: config.context_length].clone()
        model = meta_model(config)  # initial weights would be replaced at once
        model.load_state_dict(tensors, assign=True)
        return model


class CheckpointModel(TrainedModel):
    """A checkpoint written by `Trainer.save_checkpoint`."""

    def __init__(self, path: Path):
        self.path, record = path, read_record(path)
        super().__init__(str(path), GPT2Config(**record["model"]), record)
        self.saved_tokenizer: str | None = record["tokenizer"]

    def read_tokenizer(self) -> GPT2Tokenizer | None:
        try:
            return None if self.saved_tokenizer is None else GPT2Tokenizer.from_json(self.saved_tokenizer)
        except UserError as error:
            raise UserError(f"checkpoint: {self.path}: {error}") from error

    def tensors(self) -> "dict[str, Tensor]":
        run_folder.name_if_latest(self.path.parent.parent)
        checkpoint.check_memory(self.config, self.source)
        tensors = checkpoint.read_tensors(self.path, "model/")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        checkpoint.check_tensor_shapes(self.source, shapes, checkpoint.shapes_of(self.config))
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        checkpoint.check_weights(self.source, tensors)
        return tensors


class HuggingFaceModel(TrainedModel):
    """A GPT-2 in the format of `transformers`, in a folder or on the Hub."""

    def __init__(self, source: str, fetch: Callable[[list[str]], Path]):
        """
        Args:
            fetch: Downloads the model's files that match some patterns, if necessary, and returns the model's folder.
        """
        self.fetch = fetch
        super().__init__(source, hugging_face.read_config(fetch([hugging_face.CONFIG]), source))

    def read_tokenizer(self) -> GPT2Tokenizer | None:
        folder = self.fetch([hugging_face.CONFIG, *TOKENIZER_FILES])
        return GPT2Tokenizer.from_folder(folder) if _holds_tokenizer(folder) else None

    def tensors(self) -> "dict[str, Tensor]":
        return hugging_face.read_tensors(self.fetch(hugging_face.WEIGHT_FILES), self.config, self.source)


def open_model(name: str | Path | None, key: str = "checkpoint") -> TrainedModel:
    """Open a trained model by its name, see the top of this file. None is the best checkpoint of the latest run.

    Args:
        key: The option that names the model, for the error message.

    Raises:
        UserError: There is no such model, or it cannot be read.
    """
    if name is None or (str(name) == "latest" and not Path(name).exists()):
        return CheckpointModel(run_folder.find_checkpoint(None, key))
    name, path = str(name), Path(name)
    if is_on_hub(name):
        return HuggingFaceModel(name, partial(hub_folder, name, instead=OFFLINE_MODELS))
    if (path / hugging_face.CONFIG).is_file():
        return HuggingFaceModel(name, lambda patterns: path)
    if not name or not path.exists():
        raise UserError(
            f"{key}: there is no {name!r} here; use a path, latest for the latest run, or a name on the Hub: "
            f"{', '.join(OPENAI)} or OWNER/NAME"
        )
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{key}: {name} is a PEFT adapter, not a whole model; save what merge_and_unload() returns")
    if path.suffix in (".safetensors", ".bin"):
        raise UserError(f"{key}: {name} belongs to a Hugging Face folder; name the folder")
    return CheckpointModel(run_folder.find_checkpoint(name, key))


def open_tokenizer(name: str) -> GPT2Tokenizer:
    """Open a tokenizer by name: `bytes`, a folder with its files, or a trained model that holds one.

    Raises:
        UserError: There is no such tokenizer.
    """
    if name == "bytes":
        return GPT2Tokenizer.of_bytes()
    if is_on_hub(name):
        return GPT2Tokenizer.from_hub(name)
    if _holds_tokenizer(Path(name)):
        return GPT2Tokenizer.from_folder(name)
    if Path(name).name in TOKENIZER_FILES:
        raise UserError(f"data.tokenizer: {name} is a part of a tokenizer; name its folder")
    return open_model(name, "data.tokenizer").tokenizer_for_text()


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

MAX_LOGIT_DIFFERENCE = 1e-3  # of an exported model, relative to the largest logit
CHANGEABLE = ("dropout", "attention_dropout", "residual_dropout", "initializer_range")  # no weight depends on them


def finetuning_config(trained: TrainedModel, requested: GPT2Config, explicit: set[str]) -> GPT2Config:
    """Return the configuration of a model that is initialized from trained weights.

    It is the configuration of the weights, except that other dropout rates and a shorter context may be requested.

    Args:
        explicit: Fields that the user set. Other fields count as requested if they differ from their defaults.

    Raises:
        UserError: The request contradicts the weights; every such field is named.
    """
    weights, default = trained.config, GPT2Config()
    result, problems = replace(weights), []
    for name in (field.name for field in fields(GPT2Config)):
        value, actual = getattr(requested, name), getattr(weights, name)
        if value == actual or (value == getattr(default, name) and name not in explicit):
            continue
        if name in CHANGEABLE or (name == "context_length" and value < actual):
            setattr(result, name, value)
        else:
            problems.append(f"model.{name}: {value} contradicts train.init_from={trained.source}, which has {actual}")
    if problems:
        raise UserError(*problems)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Exporting


def export(trained: TrainedModel, folder: str | Path, about: ExportRun | None = None) -> None:
    """Write a folder, completely or not at all, that the Auto classes of `transformers` load.

    The logits of the written model are compared with those of `trained`.

    Args:
        about: Licence, language and repository for the model card.

    Raises:
        UserError: The model cannot be read or is no GPT-2 of `transformers`, or the folder exists or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"to: {folder} exists already; name a folder that does not")
    if trained.tokenizer is None:
        log.warning("%s holds no tokenizer, so the exported folder has none either.", trained.source)
    tensors = trained.tensors()
    card = model_card(trained, about)
    try:
        with atomic_folder(folder) as target:
            hugging_face.write_folder(target, trained.config, tensors, trained.tokenizer, card)
            del tensors
            _check_logits(trained, target)
    except OSError as error:
        raise UserError(f"to: cannot write {folder}: {error.strerror or error}") from error


def _check_logits(trained: TrainedModel, folder: Path) -> None:
    """Refuse an exported model that computes other logits because this code was changed, such as its attention."""
    import torch

    config = trained.config
    ids = (7919 * torch.arange(min(64, config.context_length)) % config.vocab_size)[None]  # of the whole vocabulary
    with torch.no_grad():
        logits = trained.build().eval()(ids)[0]
        difference = float((hugging_face.logits(folder, ids) - logits).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE * max(1.0, float(logits.abs().max())):
        raise UserError(
            f"checkpoint: {trained.source} cannot be exported: as GPT-2 of transformers its logits differ by up to "
            f"{difference:.2g}. This is a model of changed code, not OpenAI's GPT-2"
        )


def model_card(trained: TrainedModel, about: ExportRun | None = None) -> str:
    """The README of an exported folder: how to use the model, how it was trained, its loss and its shape.

    It contains no local paths.
    """
    from huggingface_hub import ModelCardData

    about, data = about or ExportRun(), trained.run["data"] if trained.run else {}
    source = trained.record["train"].get("init_from") if trained.record else trained.source
    dataset = "" if data.get("files") else data.get("dataset_name", "")
    unchanged = f"The weights are those of {_public_name(trained.source)}, unchanged."
    metadata = ModelCardData(
        language=about.language.split() if about.language else None,
        license=about.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        base_model=_repository(source) if source else None,
        datasets=[dataset] if _is_dataset_on_hub(dataset) else None,
    )
    return f"""---
{metadata.to_yaml()}
---

# {" ".join(trained.run["name"].split()) if trained.run else "GPT-2"}

A GPT-2 for `transformers`:

```python
from transformers import pipeline

write = pipeline("text-generation", "{about.push or "PATH_OF_THIS_FOLDER"}")
print(write("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```

## Training

{_training(trained.record) if trained.record else unchanged}

## Architecture

{_table({name: value for name, value in asdict(trained.config).items() if name in hugging_face.FIELDS})}
"""


def _training(record: dict[str, Any]) -> str:
    progress, train, run = record["progress"], record["train"], record["run"]
    loss = "not evaluated"
    if progress["val_loss"] is not None:
        loss = f"{progress['val_loss']:.4f} nats a token, at step {progress['evaluated_at']:,}"
    settings = ("batch_size", "accumulation_steps", "learning_rate", "weight_decay", "seed")
    return _table(
        {
            "data": _text_of(run) if run else "not recorded",
            "steps": f"{progress['step']:,}",
            "tokens": f"{progress['tokens']:,}",
            "hours": f"{progress['seconds'] / 3600:.2f}",
            "validation loss": loss,
            "started from": _public_name(train["init_from"]) if train.get("init_from") else "random weights",
            **{name: train[name] for name in settings},
            "parametrization": record["model"]["parametrization"],  # in training; exported weights are standard
            "PyTorch": record["versions"].get("torch"),
        }
    )


def _text_of(run: dict[str, Any]) -> str:
    """The names of the files, or of the dataset, that a run was trained on."""
    data, choice = run["data"], run.get("choices", {}).get("data", "text")
    if data["files"]:
        return ", ".join(dict.fromkeys(Path(name).name for name in data["files"])) if choice == "text" else choice
    name = data["dataset_name"]
    return ", ".join(filter(None, (name if _is_dataset_on_hub(name) else Path(name).name, data["dataset_config"])))


def _public_name(source: str) -> str:
    """The name of a model on the Hub, or the last part of a local path."""
    return _repository(source) or Path(source).name


def _repository(source: str) -> str | None:
    """The name of a model on the Hub; None for a local model."""
    return (f"openai-community/{source}" if source in OPENAI else source) if is_on_hub(source) else None


def _is_dataset_on_hub(name: str) -> bool:
    """Whether a name denotes a dataset on the Hub, not a folder. Old names, such as `wikitext`, have no owner."""
    return is_on_hub(name) or (re.fullmatch(r"[\w-]+", name) is not None and not Path(name).exists())


def _table(rows: dict[str, Any]) -> str:
    cells = {name: " ".join(str(value).split()).replace("|", "\\|") for name, value in rows.items()}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells.items())])
