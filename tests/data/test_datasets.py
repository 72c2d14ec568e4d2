"""Corpora from datasets of the Hub, and from folders laid out like them."""

import json
from pathlib import Path

import pytest

from gpt2.config import DataConfig
from gpt2.data.corpus import prepare
from gpt2.data_loader import load_text_data
from gpt2.errors import UserError
from tests.data.test_corpus import documents_of, start_preparing
from tests.helpers import shared


def write_dataset(folder: Path, **splits: list) -> Path:
    """A folder laid out like a dataset of the Hub: JSON lines for each split, and a README.md that lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:", "- config_name: small", "  data_files:"]
    for split, rows in splits.items():
        rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A tiny dataset", ""]))
    return folder


def dataset_config(folder: Path, tmp_path: Path, **fields) -> DataConfig:
    defaults = {"dataset_config": "small", "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    return DataConfig(str(folder), **{**defaults, **fields})


ROWS = [" = One = \n", "first line\n", "", "second line", " = Two = \n", " = = a section = = \n", "third"]


def test_rows_between_titles_are_one_document(tmp_path):
    folder = write_dataset(tmp_path / "tiny", train=ROWS, validation=ROWS[4:], test=["no title", *ROWS[:2]])
    prepared = prepare(dataset_config(folder, tmp_path))
    one = " = One = \nfirst line\n\nsecond line\n"
    two = " = Two = \n = = a section = = \nthird\n"
    assert documents_of(prepared, "train") == [one, two]
    assert documents_of(prepared, "validation") == [two]
    assert documents_of(prepared, "test") == ["no title\n", " = One = \nfirst line\n"]


def test_each_row_is_a_document_without_a_title_pattern(tmp_path):
    folder = write_dataset(tmp_path / "tiny", train=ROWS, validation=ROWS[:1], test=ROWS[-1:])
    prepared = prepare(dataset_config(folder, tmp_path, document_start=None))
    assert documents_of(prepared, "train") == [row for row in ROWS if row]
    assert (documents_of(prepared, "validation"), documents_of(prepared, "test")) == (ROWS[:1], ROWS[-1:])


def test_split_and_column_names_are_configurable(tmp_path):
    rows = {name: [{"body": f"{name} body", "text": "unwanted"}] for name in ("learn", "check", "exam")}
    names = {"train_split": "learn", "validation_split": "check", "test_split": "exam", "text_column": "body"}
    prepared = prepare(dataset_config(write_dataset(tmp_path / "tiny", **rows), tmp_path, document_start=None, **names))
    packed = {split: documents_of(prepared, split) for split in ("train", "validation", "test")}
    assert packed == {"train": ["learn body"], "validation": ["check body"], "test": ["exam body"]}


def test_rows_are_for_validation_without_a_validation_split(tmp_path):
    rows = [f"row {number}" for number in range(100)]
    folder = write_dataset(tmp_path / "tiny", train=rows, test=["test row"])
    config = dataset_config(folder, tmp_path, document_start=None, validation_split=None)
    prepared = prepare(config)
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert sorted([*train, *validation]) == sorted(rows)
    assert len(validation) == 10
    assert documents_of(prepared, "test") == ["test row"]

    without_test = dataset_config(folder, tmp_path, document_start=None, validation_split=None, test_split=None)
    _, validation, test, _ = load_text_data(without_test)
    assert test.path == validation.path


def test_tenth_of_few_documents_in_many_rows_is_for_validation(tmp_path):
    rows = [row for number in range(3) for row in (f" = {number} = ", *["a line of text"] * 99)]
    folder = write_dataset(tmp_path / "tiny", train=rows)
    prepared = prepare(dataset_config(folder, tmp_path, validation_split=None, test_split=None))
    tokens = prepared.about["tokens"]
    assert tokens["validation"] / (tokens["train"] + tokens["validation"]) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("validation_split", ["validation", None])
@pytest.mark.parametrize("document_start", [None, "^ = [^=]"])
def test_missing_text_is_an_empty_row(tmp_path, document_start, validation_split):
    rows = [" = T = ", None, "text"] * 10
    folder = write_dataset(tmp_path / "tiny", train=rows, validation=rows)
    options = {"document_start": document_start, "validation_split": validation_split, "test_split": None}
    prepared = prepare(dataset_config(folder, tmp_path, **options))
    assert all("None" not in document for document in documents_of(prepared, "train"))


@pytest.mark.parametrize(
    ("field", "wrong", "right"),
    [
        ("text_column", "body", "sentence"),
        ("train_split", "learn", "validation"),
        ("test_split", "exam", "validation"),
        ("dataset_config", "huge", "small"),
    ],
)
def test_wrong_name_is_reported_with_the_valid_ones(tmp_path, field, wrong, right):
    rows = [{"sentence": "words"}] * 3
    folder = write_dataset(tmp_path / "tiny", train=rows, validation=rows, test=rows)
    with pytest.raises(UserError) as error:
        prepare(dataset_config(folder, tmp_path, **{"text_column": "sentence", field: wrong}))
    assert wrong in str(error.value)
    assert right in str(error.value)
    assert "\n" not in str(error.value)


def test_column_without_text_is_a_user_error(tmp_path):
    rows = [{"text": "text", "number": 7}] * 3
    folder = write_dataset(tmp_path / "tiny", train=rows, validation=rows, test=rows)
    with pytest.raises(UserError, match="number"):
        prepare(dataset_config(folder, tmp_path, text_column="number"))


def test_dataset_that_cannot_be_parsed_is_a_user_error(tmp_path):
    folder = write_dataset(tmp_path / "tiny", train=["text"] * 3, validation=["text"] * 3)
    (folder / "validation.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="tiny"):
        prepare(dataset_config(folder, tmp_path, test_split=None))


def test_changed_folder_is_another_corpus(tmp_path):
    folders = []
    for text in ("before", "after"):
        folder = write_dataset(tmp_path / "tiny", train=[text] * 9, validation=[text] * 9)
        prepared = prepare(dataset_config(folder, tmp_path, document_start=None, test_split=None))
        assert documents_of(prepared, "train") == [text] * 9
        folders.append(prepared.folder)
    assert folders[0] != folders[1]


def test_folders_of_the_same_name_are_different_corpora(tmp_path):
    for place in ("here", "there"):
        folder = write_dataset(tmp_path / place / "corpus", train=[place] * 9, validation=[place] * 9)
        prepared = prepare(dataset_config(folder, tmp_path, document_start=None, test_split=None))
        assert documents_of(prepared, "train") == [place] * 9


def test_wikitext_in_a_folder_is_read_like_from_the_hub(tmp_path):
    folder = shared("datasets/wikitext")
    config = dataset_config(folder, tmp_path, dataset_config="wikitext-2-sample", max_length=64)
    train, validation, test, tokenizer = load_text_data(config)
    assert len({train.path, validation.path, test.path}) == 3
    articles = tokenizer.decode(train.tokens.tolist()).split("<|endoftext|>")
    assert len(articles) > 20
    assert all(article.startswith(" = ") for article in articles if article.strip())
    assert all(article.count("\n") > 3 for article in articles if article.strip())


UNREACHABLE = {
    "a dataset": {"dataset_name": "no-such/dataset", "dataset_config": None, "tokenizer": "bytes"},
    "the tokenizer of a local dataset": {"dataset_name": "tiny", "dataset_config": "small", "tokenizer": "gpt2"},
}


@pytest.mark.parametrize("what", UNREACHABLE)
def test_unreachable_hub_is_reported_quickly_with_alternatives(tmp_path, what):
    """In a separate process, because the libraries cache whether they are online. Online, they retry for 23 s."""
    write_dataset(tmp_path / "tiny", train=["text"] * 3, validation=["text"] * 3, test=["text"] * 3)
    output, _ = start_preparing(tmp_path, **UNREACHABLE[what]).communicate("\n", timeout=300)
    *_, offline, message = output.splitlines()
    assert offline == "HF_HUB_OFFLINE=1"
    assert "experiment=quickstart" in message


def test_document_start_that_never_matches_is_a_user_error(tmp_path):
    folder = write_dataset(tmp_path / "tiny", train=["a row"] * 9, validation=["a row"] * 9)
    with pytest.raises(UserError, match=r"data\.document_start=null"):
        prepare(dataset_config(folder, tmp_path, document_start="^ = [^=]", test_split=None))


def test_document_start_that_takes_too_long_is_a_user_error(tmp_path):
    """Also in the thread that trains a tokenizer, where `re` would block the handling of signals."""
    folder = write_dataset(tmp_path / "tiny", train=["a" * 300 + "!"] * 9, validation=["a row"] * 9)
    options = {"document_start": "(a|aa)+$", "test_split": None, "tokenizer": "train", "vocab_size": 260}
    with pytest.raises(UserError, match=r"data\.document_start: '\(a\|aa\)\+\$' takes more than 1 s for the row 'aaa"):
        prepare(dataset_config(folder, tmp_path, **options))


def test_exchanged_file_names_are_another_corpus(tmp_path):
    folder = write_dataset(tmp_path / "tiny", train=["long"] * 50, validation=["short"] * 9)
    options = {"document_start": None, "test_split": None}
    before = prepare(dataset_config(folder, tmp_path, **options)).folder
    (folder / "train.jsonl").rename(folder / "other.jsonl")
    (folder / "validation.jsonl").rename(folder / "train.jsonl")
    (folder / "other.jsonl").rename(folder / "validation.jsonl")
    swapped = prepare(dataset_config(folder, tmp_path, **options))
    assert swapped.folder != before
    assert documents_of(swapped, "train") == ["short"] * 9
