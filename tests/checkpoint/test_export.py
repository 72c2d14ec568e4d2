"""Exported folders as `transformers` reads them, and the model card."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch.testing import assert_close

from gpt2 import model
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.hugging_face import write_folder
from gpt2.checkpoint.pretrained import export, model_card, open_model
from gpt2.config import DataConfig, ExportRun, GPT2Config, TrainingConfig
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.runtime.rng import versions
from gpt2.tokenizer import GPT2Tokenizer
from tests.conftest import ROOT, SHARED
from tests.helpers import CORPUS, noisy_model, tiny_config


def save_checkpoint(path: Path, config: GPT2Config, tokenizer: GPT2Tokenizer) -> dict[str, torch.Tensor]:
    """A checkpoint as `Trainer` writes it, of an untrained model. Returns its weights."""
    tensors = noisy_model(config, std=0.05).state_dict()
    progress = {"step": 7, "tokens": 99, "seconds": 3.0, "val_loss": 2.5, "evaluated_at": 6}
    train = vars(TrainingConfig(batch_size=4))
    record = {"model": vars(config), "train": train, "run": None, "tokenizer": tokenizer.to_json()}
    about = {**record, "data": None, "progress": progress, "scaler": {}, "versions": versions()}
    checkpoint.write_checkpoint(path, {f"model/{name}": tensor for name, tensor in tensors.items()}, about)
    return tensors


@pytest.mark.parametrize("fields", [{}, {"use_bias": False}, {"activation": "gelu"}], ids=str)
def test_exported_model_is_bit_identical(tmp_path, fields):
    config = tiny_config(vocab_size=257, dropout=0.2, **fields)
    weights = save_checkpoint(tmp_path / "a.pth", config, GPT2Tokenizer.of_bytes())
    original = open_model(str(tmp_path / "a.pth"))
    export(original, tmp_path / "out")
    again = open_model(str(tmp_path / "out"))
    assert again.config == original.config
    assert again.tokenizer.fingerprint == original.tokenizer.fingerprint
    assert_close(again.tensors(), weights, atol=0, rtol=0)


def test_export_equals_the_file_of_transformers(folder):
    export(open_model(str(folder)), folder.parent / "out")
    assert (folder.parent / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


LOAD = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging
logging.disable_progress_bar()
results = []
for folder, prompt, text in json.load(sys.stdin):
    AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write = pipeline("text-generation", folder)
    texts = write([prompt, prompt * 2], batch_size=2, do_sample=False, max_new_tokens=9)  # needs a padding token
    written = texts[0][0]["generated_text"]
    ids = tokenizer(text)["input_ids"]
    results.append([written, ids, tokenizer.decode(ids)])
print(json.dumps(results))
"""


def test_transformers_loads_exports_without_warnings_and_generates_the_same(tmp_path):
    """All kinds of tokenizer in one process, because importing transformers takes seconds."""
    tokenizers = [GPT2Tokenizer.of_bytes(), GPT2Tokenizer.train([CORPUS], 300)]
    if (SHARED / "tokenizers" / "gpt2").is_dir():  # OpenAI's, beside some checkouts
        tokenizers.append(GPT2Tokenizer.from_folder(SHARED / "tokenizers" / "gpt2"))
    text = "The fox's 3 dogs …\n\n  jump — é漢🦊 ."
    requests, expected = [], []
    for number, tokenizer in enumerate(tokenizers):
        path, folder = tmp_path / f"{number}.pth", tmp_path / f"out{number}"
        config = tiny_config(vocab_size=tokenizer.vocab_size, use_bias=number == 0, context_length=64)
        save_checkpoint(path, config, tokenizer)
        trained = open_model(str(path))
        export(trained, folder)
        prompt = "The quick 🦊"
        model = trained.build()
        ids = tokenizer.encode(prompt)
        written = list(model.generate(torch.tensor([ids]), 9, do_sample=False, eos_token_id=tokenizer.eos_token_id))
        text_ids = [int(token) for token in written if int(token) != tokenizer.eos_token_id]
        requests.append([str(folder), prompt, text])
        expected.append([prompt + tokenizer.decode(text_ids), tokenizer.encode(text), text])
    done = subprocess.run([sys.executable, "-c", LOAD], input=json.dumps(requests), capture_output=True, text=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == expected


def test_export_states_special_tokens_and_length(tmp_path):
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    export(open_model(str(tmp_path / "a.pth")), tmp_path / "out")
    names = ("config", "generation_config", "tokenizer_config", "tokenizer")
    config, generation, about, tokenizer = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in names)
    assert config["bos_token_id"] == config["eos_token_id"] == generation["eos_token_id"] == 256
    assert generation["pad_token_id"] == 256
    assert about["model_max_length"] == config["n_ctx"] == 16
    assert (about["pad_token"], about["padding_side"]) == ("<|endoftext|>", "left")
    assert [token["content"] for token in tokenizer["added_tokens"] if token["special"]] == ["<|endoftext|>"]


def full_disk(folder: Path) -> Path:
    """Limit the size of files, so that a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def where_something_is(folder: Path) -> Path:
    (folder / "out").mkdir()
    return folder / "out"


@pytest.mark.parametrize(
    ("place", "complaint"),
    [(full_disk, "cannot write"), (below_a_file, "cannot write"), (where_something_is, "exists already")],
)
def test_failed_export_leaves_nothing(folder, place, complaint):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(folder.parent.rglob("*"))
    try:
        to = place(folder.parent)
        with pytest.raises(UserError, match=f"to: .*{complaint}"):
            export(open_model(str(folder)), to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name for path in folder.parent.rglob("*")} - {path.name for path in before} <= {"file", "out"}
    assert not list(folder.parent.glob("out/*"))


class ExtraGain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))


def test_model_of_changed_code_is_not_exported(tmp_path, monkeypatch):
    """Forks change the attention. Without new weights, only the logits show it."""
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    usual = model.attend

    def normalised(qkv, *others):
        return usual(torch.nn.functional.layer_norm(qkv, qkv.shape[-1:]), *others)

    with monkeypatch.context() as patch:
        patch.setattr(model, "attend", normalised)
        with pytest.raises(UserError, match="its logits differ by up to"):
            export(open_model(str(tmp_path / "a.pth")), tmp_path / "out")
    patched = GPT2Model(tiny_config(vocab_size=257))
    patched.blocks[0].attention.extra = ExtraGain()
    with pytest.raises(UserError, match=r"GPT-2 of transformers has no blocks\.0\.attention\.extra\.gain"):
        write_folder(tmp_path, patched.config, patched.state_dict(), None, "")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth"}


def test_model_without_tokenizer_is_exported_with_a_warning(folder, caplog):
    export(open_model(str(folder)), folder.parent / "out")
    assert "holds no tokenizer, so the exported folder has none" in caplog.text
    assert open_model(str(folder.parent / "out")).tokenizer is None


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def test_model_card_states_training_and_shape(tmp_path):
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    export(open_model(str(tmp_path / "a.pth")), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "| steps | 7 |",
        "| validation loss | 2.5000 nats a token, at step 6 |",
        "| d_model | 16 |",
        "| tokens | 99 |",
    ):
        assert fact in card


@pytest.fixture
def finetuned(tmp_path):
    """A function that returns a trained model with given training settings in its record."""
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    trained = open_model(str(tmp_path / "a.pth"))

    def finetune(init_from: str | None = None, choices: dict[str, str] | None = None, **data):
        trained.record["train"]["init_from"] = init_from
        trained.record["run"] = {"name": "first", "data": vars(DataConfig(**data)), "choices": choices or {}}
        return trained

    return finetune


@pytest.mark.parametrize(
    ("data", "name", "datasets"),
    [
        ({}, "wikitext, wikitext-2-raw-v1", ["wikitext"]),
        ({"dataset_config": None}, "wikitext", ["wikitext"]),
        ({"dataset_name": "someone/texts", "dataset_config": None}, "someone/texts", ["someone/texts"]),
        ({"dataset_name": "/home/ann/texts", "dataset_config": None}, "texts", None),
        ({"dataset_name": "./texts", "dataset_config": None}, "texts", None),
        ({"dataset_name": "tests/texts", "dataset_config": None}, "texts", None),  # tests/ is a folder here
        ({"files": ["a.txt", "b*"]}, "a.txt, b*", None),
        ({"files": ["/home/ann/a.txt", "../c/**/*.txt", "~/d/*.txt"]}, "a.txt, *.txt", None),
        ({"files": ["/usr/lib/python3/**/*.py"], "choices": {"data": "stdlib"}}, "stdlib", None),
        ({"files": ["/home/ann/a.txt"], "choices": {"data": "text"}}, "a.txt", None),
    ],
)
def test_model_card_names_the_data_without_folders(finetuned, monkeypatch, data, name, datasets):
    monkeypatch.chdir(ROOT)
    card = ModelCard(model_card(finetuned(**data)))
    assert f"| data | {name} |" in card.content
    assert card.data.datasets == datasets


@pytest.mark.parametrize(
    ("init_from", "base", "name"),
    [
        (None, None, "random weights"),
        ("gpt2-medium", "openai-community/gpt2-medium", "openai-community/gpt2-medium"),
        ("someone/model", "someone/model", "someone/model"),
        ("/home/ann/models/first", None, "first"),
        ("outputs/runs/first/2026-11-23_12-48-59-a6ee", None, "2026-11-23_12-48-59-a6ee"),
        ("gpt2/last.pth", None, "last.pth"),
    ],
)
def test_model_card_names_the_base_model_if_it_is_on_the_hub(finetuned, init_from, base, name):
    card = ModelCard(model_card(finetuned(init_from)))
    assert card.data.base_model == base
    assert f"| started from | {name} |" in card.content


def test_metadata_of_the_model_card(finetuned):
    about = ExportRun(license="cc-by-sa-4.0", language="en de", push="me/first")
    card = ModelCard(model_card(finetuned("gpt2"), about))
    assert card.data.to_dict() == {
        "license": "cc-by-sa-4.0",
        "language": ["en", "de"],
        "base_model": "openai-community/gpt2",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2"],
        "datasets": ["wikitext"],
    }
    assert 'pipeline("text-generation", "me/first")' in card.content


def test_model_card_of_unchanged_weights_names_no_folder(folder):
    card = ModelCard(model_card(open_model(str(folder))))
    assert "The weights are those of theirs, unchanged." in card.content
    assert (card.data.base_model, card.data.license) == (None, "unknown")
    assert str(folder.parent) not in card.content
