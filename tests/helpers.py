"""Shared by tests: data beside the checkout, small models, their twins in `transformers`, and difficult texts."""

import string
import weakref
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.hugging_face import hf_layout, hf_name
from gpt2.config import GPT2Config
from gpt2.model import GPT2Model
from gpt2.tokenizer import GPT2Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}


def shared(path: str) -> Path:
    """A file or folder of `../shared`; the test is skipped if it is missing."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs ../shared/{path}, which is not beside this checkout")
    return found


def tiny_config(**fields) -> GPT2Config:
    """A model of a few thousand weights, without dropout."""
    shape = {"vocab_size": 61, "context_length": 16, "d_model": 16, "num_heads": 4, "num_layers": 2, "d_ff": 40}
    return GPT2Config(**{**shape, **NO_DROPOUT, **fields})


def noisy_model(config: GPT2Config, seed: int = 0, std: float = 0.2) -> GPT2Model:
    """A model without weights of exactly zero or one, so that missing or exchanged weights change its output."""
    torch.manual_seed(seed)
    model = GPT2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def random_ids(config: GPT2Config, b: int, t: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


def padding_mask(side: str, b: int, t: int) -> Tensor:
    """A mask (b, t) whose row i has i positions of padding on one side."""
    mask = torch.ones(b, t, dtype=torch.long)
    for row in range(1, b):
        mask[row, slice(t - row, t) if side == "right" else slice(row)] = 0
    return mask


def finish(generator: Generator) -> tuple[list[Tensor], Tensor]:
    """The values that a generator yields, and its return value."""
    yielded = []
    while True:
        try:
            yielded.append(next(generator))
        except StopIteration as stop:
            return yielded, stop.value


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def from_transformers(tensors: Iterable[tuple[str, Tensor]], model: GPT2Model) -> dict[str, Tensor]:
    """Convert tensors of GPT2LMHeadModel (weights or gradients) to the names and layout of `model`."""
    theirs = dict(tensors)
    return {name: hf_layout(name, theirs[f"transformer.{hf_name(name)}"]) for name in model.state_dict()}


def transformers_twin(model: GPT2Model):
    """A GPT2LMHeadModel with the weights of `model`."""
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    ours = model.config
    twin = GPT2LMHeadModel(
        TheirConfig(
            vocab_size=ours.vocab_size,
            n_positions=ours.context_length,
            n_embd=ours.d_model,
            n_head=ours.num_heads,
            n_layer=ours.num_layers,
            n_inner=ours.d_ff,
            activation_function=ours.activation,
            layer_norm_epsilon=ours.layer_norm_epsilon,
            embd_pdrop=ours.dropout,
            attn_pdrop=ours.attention_dropout,
            resid_pdrop=ours.residual_dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs = {f"transformer.{hf_name(name)}": hf_layout(name, t) for name, t in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(theirs, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the token embedding
    return twin


def write_tokenizer(folder: Path, tokenizer: GPT2Tokenizer | None = None) -> None:
    """Write a tokenizer, by default one of bytes, into a folder of weights."""
    (tokenizer or GPT2Tokenizer.of_bytes()).to_folder(folder, context_length=16)


def only_a_pickle(folder: Path) -> None:
    """Rename the weights of a folder to the name of a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_numbers(model: GPT2Model, device: str) -> GPT2Model:
    """Replace the weights with empty tensors on a device, made by the current mode, such as `FakeTensorMode`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    return model


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of given tensors, and of those that operations return, until they are freed."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage.nbytes())

    def freed(self, size: int) -> None:
        self.now -= size


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def rewrite_record(path: Path, change: Callable[[dict], dict], tensors: dict[str, Tensor] | None = None) -> None:
    """Change the record of a checkpoint, or some of its tensors, with valid checksums. Hard links keep the old file."""
    record, stored = checkpoint.read_record(path), checkpoint.read_tensors(path)
    path.unlink()
    checkpoint.write_checkpoint(path, {**stored, **(tensors or {})}, change(record))


def with_value(record: dict, key: str, value: object) -> dict:
    """A copy of a record with one value changed, by its dotted key; `...` removes it."""
    first, _, rest = key.partition(".")
    copy = {**record, first: with_value(record[first], rest, value) if rest else value}
    return {name: value for name, value in copy.items() if value is not ...}


# ---------------------------------------------------------------------------------------------------------------------
# Text

CORPUS = "The quick brown fox jumps over the lazy dog. " * 50

_SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2003\u2028\u2029\u3000"  # each kind of white space in Unicode
_CONTROLS = "".join(map(chr, (*range(9), *range(0x0E, 0x20), 0x7F))) + "\u200b\u200d\u202e\ufeff\ufffd\ufffe"
_LETTERS = "aZéßİıǅñΩжאع가あ漢ﬁ" + "e\u0301" + "\U0001d518\U00010348"
_NUMBERS = "0٣²½Ⅷ𝟘"
_SYMBOLS = "😀👩🏽🇩🇪️€…’—•|<>'\"\\" + string.punctuation
_WORDS = ["<|endoftext|>", "<|endoftext|", "'ll", "'s", " the", "  ", "\r\n", "\n\n\n", "#version", "http://a.b/c?d=e"]
_WORDS += ["👩\u200d👩\u200d👧\u200d👦"]  # a family: four people with zero-width joiners
_NASTY = [*_SPACES, *_CONTROLS, *_LETTERS, *_NUMBERS, *_SYMBOLS, *_WORDS]


def nasty_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Reproducible random texts of characters that are difficult for tokenizers."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, size=count)
    return ["".join(_NASTY[i] for i in random.integers(len(_NASTY), size=length)) for length in lengths]


def python_source() -> str:
    """About 240,000 characters of structured text that every Python installation has."""
    import _pydecimal
    import argparse

    return "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (_pydecimal, argparse))
