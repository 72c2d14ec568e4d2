"""The converter of llama.cpp. Needs a checkout of it, whose folder LLAMA_CPP names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2.checkpoint.pretrained import open_model
from gpt2.tokenizer import GPT2Tokenizer
from tests.compat.conftest import export_model
from tests.helpers import CORPUS, shared

pytest.importorskip("gguf", reason="needs gguf: pip install -e '.[compat]'")

CONVERTER = "convert_hf_to_gguf.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no checkout of llama.cpp"),
]


def convert(folder: Path, checkout: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, checkout / CONVERTER, folder, "--outfile", folder / "model.gguf", "--outtype", "f32"]
    return subprocess.run(command, capture_output=True, text=True)


def knowing_all_tokenizers(checkout: Path, folder: Path) -> Path:
    """A copy of the converter with the change of docs/models.md."""
    for name in (CONVERTER, "conversion", "gguf-py"):  # newer checkouts have most of the code in the second
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, folder / name)
        elif (checkout / name).is_file():
            shutil.copy(checkout / name, folder / name)
    (file,) = (path for path in folder.rglob("*.py") if "def get_vocab_base_pre" in path.read_text())
    before, found, after = file.read_text().partition("        res = None\n")
    assert found
    file.write_text(f'{before}        res = "gpt-2"\n{after}')
    return folder


def check(folder: Path) -> None:
    """Check that `transformers` reads the file as the same model and tokenizer."""
    ids = torch.arange(40).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    with torch.no_grad():
        assert_close(model(ids).logits, open_model(folder).build().eval()(ids)[0], atol=1e-5, rtol=1e-5)
    tokenizer, text = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf"), "The quick 🦊 jumps\n\n  over 12"
    assert tokenizer(text)["input_ids"] == open_model(folder).tokenizer.encode(text)


# The loader of transformers assumes a context of 1,024.


def test_folder_with_the_tokenizer_of_openai_converts(tmp_path):
    tokenizer = GPT2Tokenizer.from_folder(shared("tokenizers/gpt2"))
    folder = export_model(tmp_path, tokenizer, context_length=1024)
    done = convert(folder, Path(os.environ["LLAMA_CPP"]))
    assert done.returncode == 0, done.stderr
    check(folder)


def test_trained_tokenizer_converts_with_the_changed_converter(tmp_path):
    folder = export_model(tmp_path, GPT2Tokenizer.train([CORPUS], 300), context_length=1024)
    checkout = Path(os.environ["LLAMA_CPP"])
    refused = convert(folder, checkout)
    assert "BPE pre-tokenizer was not recognized" in refused.stderr
    assert "chkhsh:" in refused.stderr
    done = convert(folder, knowing_all_tokenizers(checkout, tmp_path))
    assert done.returncode == 0, done.stderr
    check(folder)
