"""An exported model with a trained tokenizer, to be opened by other tools."""

from pathlib import Path

import pytest

from gpt2.checkpoint.pretrained import export, open_model
from gpt2.tokenizer import GPT2Tokenizer
from tests.checkpoint.test_export import save_checkpoint
from tests.helpers import CORPUS, tiny_config


def export_model(folder: Path, tokenizer: GPT2Tokenizer, **fields: object) -> Path:
    """An exported model with random weights and that tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(vocab_size=tokenizer.vocab_size, **{"context_length": 64, "d_ff": 64, **fields})
    save_checkpoint(folder / "model.pth", config, tokenizer)
    export(open_model(folder / "model.pth"), folder / "exported")
    return folder / "exported"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tmp_path_factory.mktemp("compat"), GPT2Tokenizer.train([CORPUS], 300))
