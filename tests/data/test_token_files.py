"""Files of tokens that other programs wrote: nanoGPT's, and the shards of llm.c and modded-nanogpt."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt2.config import DataConfig
from gpt2.data.corpus import prepare
from gpt2.data.token_files import HEADER_BYTES, MAGIC, TokenFile, Tokens, split_end
from gpt2.data_loader import load_split, load_text_data
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import validate
from tests.conftest import TEXT, TINY, Workspace
from tests.data.test_corpus import config_of

TOKENS = np.array(GPT2Tokenizer.of_bytes().encode(TEXT), dtype=np.uint16)
TOKENS[500::1000] = 256  # documents end
TRAIN, VALIDATION = TOKENS[:-3000], TOKENS[-3000:]


def header(count: int, magic: int = MAGIC, version: int = 1) -> bytes:
    return np.array([magic, version, count, *[0] * 253], dtype="<i4").tobytes()


def write_nanogpt(folder: Path) -> list[str]:
    """Write `train.bin` and `val.bin` like nanoGPT's `prepare.py`. Returns the pattern for them."""
    folder.mkdir()
    TRAIN.tofile(folder / "train.bin")
    VALIDATION.tofile(folder / "val.bin")
    return [str(folder / "*.bin")]


def write_shards(folder: Path) -> list[str]:
    """Write the same tokens as shards with a header."""
    folder.mkdir()
    shards = {f"fineweb_train_{number:06}": part for number, part in enumerate(np.array_split(TRAIN, 3), start=1)}
    for name, tokens in {**shards, "fineweb_val_000000": VALIDATION}.items():
        (folder / f"{name}.bin").write_bytes(header(len(tokens)) + tokens.tobytes())
    return [str(folder / "*.bin")]


@pytest.mark.parametrize("write", [write_nanogpt, write_shards])
def test_splits_are_found_by_name_and_read_in_place(tmp_path, write):
    config = config_of(tmp_path, files=write(tmp_path / "bin"), max_length=50)
    train, validation, test, tokenizer = load_text_data(config)
    assert tokenizer.vocab_size == 257
    assert test.path == validation.path
    for dataset, tokens in ((train, TRAIN), (validation, VALIDATION), (load_split(config, "all"), TOKENS)):
        assert dataset.number_of_tokens == len(tokens)
        blocks = dataset.__getitems__(list(range(len(dataset))))
        padded = np.concatenate([tokens, np.full(len(blocks["targets"]) * 50 + 1 - len(tokens), -100)], dtype=np.int64)
        assert blocks["targets"].flatten().tolist() == padded[1:].tolist()
        assert blocks["input_ids"].flatten().tolist() == padded[:-1].clip(0).tolist()
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_slices_of_several_files_are_those_of_one(tmp_path):
    files, whole = [], np.arange(12, dtype=np.uint16)
    for number, part in enumerate((whole[:5], whole[5:6], whole[6:])):
        files.append(TokenFile(tmp_path / str(number), 6, len(part)))
        files[-1].path.write_bytes(b"header" + part.tobytes())
    tokens = Tokens(files, "uint16")
    for start in range(12):
        for stop in range(start + 1, 15):
            assert tokens[start:stop].tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.75])
def test_end_of_the_files_replaces_missing_validation_files(tmp_path, fraction):
    (pattern,) = write_shards(tmp_path / "bin")
    files = [pattern.replace("*", "*train*")]
    prepared = prepare(config_of(tmp_path, files=files, validation_fraction=fraction))
    first, second = (Tokens(prepared.in_place[split], "uint16")[:] for split in ("train", "validation"))
    assert np.concatenate([first, second]).tolist() == TRAIN.tolist()
    assert len(second) == round(fraction * len(TRAIN))
    assert split_end(prepared.in_place["train"], 0)[1] == []


def test_fingerprint_is_that_of_contents_and_splits(tmp_path):
    files = write_nanogpt(tmp_path / "bin")
    config = config_of(tmp_path, files=files)
    first = prepare(config).about["fingerprint"]
    (tmp_path / "bin").rename(tmp_path / "moved")
    moved = config_of(tmp_path, files=[str(tmp_path / "moved" / "*.bin")])
    assert prepare(moved).about["fingerprint"] == first
    (tmp_path / "moved" / "train.bin").rename(tmp_path / "moved" / "x")
    (tmp_path / "moved" / "val.bin").rename(tmp_path / "moved" / "train.bin")
    (tmp_path / "moved" / "x").rename(tmp_path / "moved" / "val.bin")
    assert prepare(moved).about["fingerprint"] != first


def test_kind_and_split_come_from_the_name_of_a_link(tmp_path):
    """In the cache of the Hub, a file is named by its checksum and has a link with its own name."""
    write_shards(tmp_path / "blobs")
    (tmp_path / "bin").mkdir()
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (tmp_path / "bin" / path.name).symlink_to(path.rename(tmp_path / "blobs" / f"{number}"))
    tokens = prepare(config_of(tmp_path, files=[str(tmp_path / "bin" / "*.bin")])).about["tokens"]
    assert tokens == {"train": len(TRAIN), "validation": len(VALIDATION), "test": 0}


SOME = TRAIN[:1000].tobytes()
DAMAGES = {  # content of the file, and the end of the message
    "odd.bin": (SOME + b"x", "has 2,001 bytes, which is not a whole number of 16-bit tokens"),
    "empty.bin": (b"", "is empty"),
    "header_only.bin": (header(0), "is empty"),
    "magic.bin": (header(1000, magic=20240801) + SOME, "its first number is 20240801, not 20240520"),
    "version.bin": (header(1000, version=7) + SOME, "has a header of version 7, not 1"),
    "cut.bin": (header(1001) + SOME, "has 1,000 tokens, but its header says 1,001"),
    "long.bin": (header(999) + SOME, "has 1,000 tokens, but its header says 999"),
    "wide.bin": (
        np.arange(1, 999, dtype="<u4").tobytes(),
        "has 32-bit tokens: every second 16-bit number is 0; write them as uint16",
    ),
    "half_a_header.bin": (header(1000)[: HEADER_BYTES // 2], "has 0 tokens, but its header says 1,000"),
}


def test_damage_is_one_line_for_each_file(workspace: Workspace):
    folder = workspace.folder / "bin"
    write_shards(folder)
    for name, (content, _) in DAMAGES.items():
        (folder / name).write_bytes(content)
    done = workspace.run("train.py", *TINY, "data.files=[bin/*.bin]", expect=2)
    lines = [f"error: data.files: {folder / name} {words}" for name, (_, words) in sorted(DAMAGES.items())]
    begins = "begins with a header of another kind: "
    assert done.stderr.replace(begins, "").splitlines() == lines


def test_unknown_tokens_and_other_kinds_are_refused(tmp_path):
    files = write_nanogpt(tmp_path / "bin")
    (tmp_path / "a.txt").write_text("text")
    assert validate(DataConfig(files=[str(tmp_path / "bin")]))[0].endswith(
        "is a folder; name its files, such as " + repr(files[0])
    )
    with pytest.raises(UserError, match=r"a\.txt is text beside files of tokens"):
        prepare(config_of(tmp_path, files=[*files, str(tmp_path / "a.txt")]))
    with pytest.raises(UserError, match=r"data\.tokenizer: data\.files holds tokens, .* \(data=tokens\)"):
        load_text_data(DataConfig(files=files, tokenizer="train"))
    (tmp_path / "bin" / "train.bin").write_bytes(TRAIN[:7].tobytes() + b"\1\1" + SOME)
    with pytest.raises(UserError, match=r"train\.bin has token 257 at 7, but data\.tokenizer has 257; the file is dam"):
        prepare(config_of(tmp_path, files=files))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock" and path.is_file()]
    (tmp_path / "bin" / "meta.pkl").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"train\.bin has tokens of the characters in meta\.pkl beside it"):
        prepare(config_of(tmp_path, files=files))


def test_files_without_one_for_training_are_refused(tmp_path):
    write_nanogpt(tmp_path / "bin")
    with pytest.raises(UserError, match="no text in the train split; the name of a token file decides its split"):
        prepare(config_of(tmp_path, files=[str(tmp_path / "bin" / "val.bin")]))


def test_run_resumes_exactly_and_is_evaluated(workspace: Workspace):
    write_nanogpt(workspace.folder / "nanogpt")
    write_shards(workspace.folder / "shards")
    tokens = [*(word for word in TINY if not word.startswith("data")), "data=tokens", "data.tokenizer=bytes"]
    tokens += ["train.lr_schedule=wsd", "train.decay_fraction=0"]  # a schedule that does not depend on the last step
    workspace.run("train.py", *tokens, "data.files=[nanogpt/*.bin]", "hydra.run.dir=whole")
    workspace.run("train.py", *tokens, "data.files=[shards/*.bin]", "hydra.run.dir=resumed", "train.max_steps=4")
    workspace.run("train.py", "resume=resumed", "train.max_steps=8", "wandb=off")
    whole, resumed = (
        [json.loads(line).get("val/loss") for line in (workspace.folder / run / "metrics.jsonl").open()]
        for run in ("whole", "resumed")
    )
    assert whole == resumed
    done = workspace.run("evaluate.py", "checkpoint=resumed", "wandb=off")
    assert "data   shards/*.bin: validation, windows of 32 tokens" in done.stdout
    predicted, ends = VALIDATION[1:], (VALIDATION[1:] == 256).sum()
    result = json.loads((workspace.folder / "resumed" / "evaluation.json").read_text())
    assert (result["tokens"], result["bytes"]) == (len(predicted), len(predicted) - ends)
    done = workspace.run("gpt2/main.py", "compare", "whole", "resumed")
    assert done.stdout.count(f"{whole[-1]:.4f}") >= 2
    with (workspace.folder / "shards" / "fineweb_train_000002.bin").open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(b"\1\0")  # another token
    done = workspace.run("train.py", "resume=resumed", "train.max_steps=9", "wandb=off", expect=2)
    assert "was trained on other data" in done.stderr
