"""Evaluation matches a plain loop over `transformers` for all batch sizes, strides and lengths."""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gpt2.config import DataConfig
from gpt2.data_loader import TokenDataset, identity_collate, load_split, load_text_data
from gpt2.errors import UserError
from gpt2.evaluate import Evaluator, as_inputs, score
from gpt2.model import IGNORE_INDEX, GPT2Model
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.tracking.evaluations import earlier_results
from tests.conftest import ROOT, TEXT, TINY, Workspace
from tests.helpers import noisy_model, tiny_config, transformers_twin

LENGTH = 16  # tokens in a window: the context of `tiny_config`


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    return noisy_model(tiny_config(vocab_size=257)).eval()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A split of 101 tokens of bytes, some of them ends of documents."""
    ids = np.random.default_rng(0).integers(0, 256, size=101)
    ids[[7, 50]] = 256
    ids.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


def windows(path: Path, stride: int | None = None, length: int = LENGTH) -> TokenDataset:
    return TokenDataset(path, "uint16", length, GPT2Tokenizer.of_bytes(), stride=stride)


def evaluate(model: GPT2Model, blocks: TokenDataset, batch_size: int = 4) -> dict[str, float]:
    return Evaluator(model, DataLoader(blocks, batch_size, collate_fn=identity_collate), "cpu").evaluate()


def loss_by_transformers(model: GPT2Model, path: Path, stride: int) -> float:
    """The mean loss over all tokens but the first, by an independent loop over windows.

    Each token is scored in the first window that contains it.
    """
    theirs = transformers_twin(model).eval()
    ids = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
    losses, scored = [], 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + LENGTH + 1]
        with torch.no_grad():
            log_probabilities = theirs(window[None, :-1]).logits[0].log_softmax(-1)
        for place in range(max(scored - start, 1), len(window)):
            losses.append(-log_probabilities[place - 1, window[place]].item())
        scored = max(scored, start + len(window))
        if scored == len(ids):
            break
    assert len(losses) == len(ids) - 1
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
def test_loss_matches_plain_loop_over_transformers(model, tokens, stride):
    metrics = evaluate(model, windows(tokens, stride))
    expected = loss_by_transformers(model, tokens, stride)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert metrics["tokens"] == 100


@pytest.mark.parametrize("stride", [None, 5])
def test_loss_does_not_depend_on_batch_size(model, tokens, stride):
    losses = [evaluate(model, windows(tokens, stride), size)["loss"] for size in (1, 2, 3, 7, 100)]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-6)


@pytest.mark.parametrize("count", [2, 3, LENGTH, LENGTH + 1, LENGTH + 2, 50, 101])
@pytest.mark.parametrize("stride", [None, 1, 3, 15, 16])
def test_each_token_is_scored_once_with_full_context(tmp_path, count, stride):
    path = tmp_path / "tokens.bin"
    np.arange(count, dtype=np.uint16).tofile(path)
    blocks = windows(path, stride)
    scored = {}
    for i in range(len(blocks)):
        block = blocks[i]
        for place in (block["targets"] != IGNORE_INDEX).nonzero().flatten().tolist():
            token = block["targets"][place].item()
            assert token not in scored
            assert block["input_ids"][: place + 1].tolist() == list(range(token - place - 1, token))
            scored[token] = place + 1
    assert sorted(scored) == list(range(1, count))
    least = LENGTH - (stride or LENGTH) + 1
    assert all(context >= min(token, least) for token, context in scored.items())


def test_stride_of_window_length_gives_plain_blocks(tokens):
    plain, strided = windows(tokens), windows(tokens, LENGTH)
    assert len(plain) == len(strided) == 7
    for i in range(7):
        assert all(torch.equal(plain[i][key], strided[i][key]) for key in ("input_ids", "targets"))


def test_bits_per_byte_count_text_without_document_ends(model, tokens):
    metrics = evaluate(model, windows(tokens))
    ids = np.fromfile(tokens, dtype=np.uint16)[1:]
    assert metrics["bytes"] == (ids != 256).sum() == 98
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] * 100 / math.log(2) / 98, abs=1e-9)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path):
    """A model with uniform predictions needs log2(v) bits per token, so bits per byte follow from the text alone."""
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizers = {"bytes": GPT2Tokenizer.of_bytes(), "trained": GPT2Tokenizer.train([TEXT], 300)}
    for name, tokenizer in tokenizers.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.to_folder(folder, LENGTH)
        data = DataConfig(
            files=[str(tmp_path / "text.txt")],
            tokenizer=str(folder),
            max_length=LENGTH,
            cache_dir=str(tmp_path / "cache"),
        )
        uniform = GPT2Model(tiny_config(vocab_size=tokenizer.vocab_size))
        torch.nn.init.zeros_(uniform.token_embedding.weight)
        metrics = evaluate(uniform, load_split(data, "train"))
        characters = int(len(TEXT) * 0.9)
        first = len(tokenizer.token_bytes[tokenizer.encode(TEXT)[0]])  # the first token is not predicted
        assert metrics["bytes"] == characters - first
        expected = metrics["tokens"] * math.log2(tokenizer.vocab_size) / (characters - first)
        assert metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_sum_is_double_precision(model, tokens):
    """In single precision, a sum of a hundred losses has a relative error of 1e-7."""
    loader = DataLoader(windows(tokens), 100, collate_fn=identity_collate)
    (batch,) = map(as_inputs, loader)
    with torch.no_grad():
        losses = model.token_losses(**batch).flatten().tolist()
    assert score(model, loader, torch.device("cpu")).nats == pytest.approx(math.fsum(losses), rel=1e-14)


def test_precision_applies_to_matrix_products(model, tokens):
    loader = DataLoader(windows(tokens), 4, collate_fn=identity_collate)
    exact, rounded = (Evaluator(model, loader, "cpu", name).evaluate()["loss"] for name in ("fp32", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_padding_is_ignored(model):
    ids = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[2, 4:] = 0
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, IGNORE_INDEX), "attention_mask": mask}
    metrics = Evaluator(model, DataLoader([batch], batch_size=None), "cpu").evaluate()
    theirs = transformers_twin(model).eval()
    with torch.no_grad():
        alone = [
            theirs(row[None, : int(real.sum())], labels=row[None, : int(real.sum())]).loss.item()
            for row, real in zip(ids, mask, strict=True)
        ]
    expected = sum(loss * (int(real.sum()) - 1) for loss, real in zip(alone, mask, strict=True)) / (11 + 8 + 3)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    left = {"input_ids": ids, "labels": ids, "attention_mask": mask.flip(1)}
    blind = {key: left[key] for key in ("input_ids", "labels")}
    scored = [Evaluator(model, DataLoader([b], batch_size=None), "cpu").evaluate()["loss"] for b in (left, blind)]
    assert scored[0] != scored[1]  # the mask reaches the model


@pytest.mark.parametrize("batch", [{"foo": torch.zeros(1, 2)}, {"input_ids": torch.zeros(1, 2)}])
def test_incomplete_batch_is_refused(batch):
    with pytest.raises(ValueError, match="a batch needs input_ids and either targets or labels"):
        as_inputs(batch)


def test_labels_that_are_shifted_already_are_refused():
    tokens = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="shifted already"):
        as_inputs((tokens[:, :-1], tokens[:, 1:]))
    for ids in (tokens, torch.zeros(3, 9, dtype=torch.long), tokens[:, :1]):
        assert as_inputs((ids, ids))["targets"][:, -1].tolist() == [IGNORE_INDEX] * 3


@pytest.mark.parametrize("stride", [0, -3, 17])
def test_stride_that_skips_tokens_is_refused(tokens, stride):
    with pytest.raises(ValueError, match="between 1 and 16"):
        windows(tokens, stride)


def test_all_splits_of_a_source(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "validation", "test"))
        + "---\n"
    )
    data = DataConfig(
        dataset_name=str(tmp_path),
        dataset_config=None,
        document_start=None,
        tokenizer="bytes",
        cache_dir=f"{tmp_path}/.c",
    )
    assert GPT2Tokenizer.of_bytes().decode(load_split(data, "all").tokens) == "".join(
        f"{split}<|endoftext|>" for split in ("train", "validation", "test")
    )


def test_single_split_matches_the_same_split_of_all(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    data = DataConfig(files=[str(tmp_path / "text.txt")], tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    train, validation, _, _ = load_text_data(data)
    for split, expected in (("train", train), ("validation", validation), ("test", validation)):
        alone = load_split(data, split)
        assert alone.tokens.tolist() == expected.tokens.tolist()
    assert sorted(path.name for path in alone.path.parent.glob("*.bin")) == ["validation.bin"]
    assert bytes(load_split(data, "all").tokens[:-1].astype(np.uint8)) == TEXT.encode()


# The script


def test_evaluation_of_run_is_printed_and_stored(trained: Workspace):
    done = trained.run_anew("evaluate.py", "batch_size=3")
    (run,) = trained.runs()
    result = json.loads((run / "evaluation.json").read_text())
    assert result["split"] == "validation"  # text files have no test split, and a note says so
    assert "no test split" in done.stderr
    assert f"loss{result['loss']:>30.4f}  nats a token" in done.stdout
    assert f"bits per byte{result['bits_per_byte']:>21.4f}" in done.stdout
    assert "written to" in done.stdout
    assert "\non     cpu, fp32\n" in done.stdout
    assert result["data"]["max_length"] == 32
    assert result["tokens"] > 1000
    trained.run("evaluate.py", "stride=8", "output=strided.json")
    strided = json.loads((trained.folder / "strided.json").read_text())
    assert strided["tokens"] == result["tokens"]
    assert strided["loss"] != result["loss"]
    assert (strided["stride"], strided["batch_size"], strided["precision"], strided["step"]) == (8, 8, "fp32", 8)
    assert strided["checkpoint"].endswith("best_model.pth")

    trained.run("evaluate.py", "data=text", "data.files=[corpus.txt]", "split=all")
    again = json.loads((run / "evaluation.json").read_text())
    assert again["split"] == "all"
    assert [earlier["split"] for earlier in again["earlier"]] == ["validation"]  # nothing is lost
    (run / "evaluation.json").unlink()
    (trained.folder / "strided.json").unlink()


def test_other_files_replace_the_files_for_validation_of_the_run(workspace: Workspace):
    for name, size in (("val.txt", 500), ("other.txt", 900)):
        (workspace.folder / name).write_text(TEXT[:size])
    workspace.run("train.py", *TINY, "data.validation_files=[val.txt]", "train.max_steps=2", "train.eval_every=2")
    for arguments, tokens in (([], 500), (["data.files=[other.txt]", "split=all"], 900)):
        workspace.run("evaluate.py", *arguments, f"output={tokens}.json")
        assert json.loads((workspace.folder / f"{tokens}.json").read_text())["tokens"] == tokens


def test_results_of_concurrent_evaluations_are_all_stored(trained: Workspace):
    sizes = [1, 2, 3, 5]
    options = {"errors_in_output": True}
    running = [trained.start("evaluate.py", f"batch_size={size}", "output=many.json", **options) for size in sizes]
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert "written to many.json" in output
    newest = json.loads((trained.folder / "many.json").read_text())
    results = [*newest.pop("earlier"), newest]
    assert sorted(result["batch_size"] for result in results) == sizes
    assert not any("earlier" in result for result in results)
    (trained.folder / "many.json").unlink()


def test_file_without_results_is_not_replaced(tmp_path):
    evaluate = runpy.run_path(str(ROOT / "evaluate.py"))
    path = tmp_path / "mine.json"
    for content in (b"", b"[]", b"{}", b'{"earlier": "ab"}', b'{"earlier": {"a": 1}}', b"[" * 9999, b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a result of evaluate"):
            evaluate["add_result"](path, {"loss": 1.0})
        assert path.read_bytes() == content
    with pytest.raises(UserError, match=r"cannot read the earlier results in /proc/self/mem: Input/output error"):
        earlier_results(Path("/proc/self/mem"))


def test_evaluation_of_foreign_model_is_stored_by_name(workspace: Workspace):
    transformers_twin(noisy_model(tiny_config(vocab_size=257))).save_pretrained(workspace.folder / "their" / "model")
    GPT2Tokenizer.of_bytes().to_folder(workspace.folder / "their" / "model", LENGTH)
    workspace.run("evaluate.py", "checkpoint=their/model", "data=text", "data.files=[corpus.txt]")
    assert (workspace.folder / "outputs" / "evaluations" / "their_model" / "evaluation.json").is_file()


def test_window_length_is_that_of_training(workspace: Workspace):
    workspace.run("train.py", *TINY, "data.max_length=16")
    done = workspace.run("evaluate.py")
    assert "windows of 16 tokens, stride 16" in done.stdout
    assert "windows of 32 tokens" in workspace.run("evaluate.py", "data.max_length=32").stdout


def test_other_data_use_tokenizer_of_model(trained: Workspace, tmp_path):
    (tmp_path / "other.txt").write_text("Another text altogether. " * 40)
    trained.run(
        *(
            "evaluate.py",
            "data=text",
            f"data.files=['{tmp_path}/other.txt']",
            "split=all",
            f"output='{tmp_path}/out/e.json'",
        ),
    )
    result = json.loads((tmp_path / "out" / "e.json").read_text())
    assert result["bytes"] == 25 * 40 - 1
    assert result["tokens"] == result["bytes"] + 1  # the end of the document
    assert result["data"]["max_length"] == 32


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["stride=33"], "stride: 33 is not between 1 and data.max_length=32"),
        (["stride=0"], "stride: 0 is not between 1"),
        (["data.max_length=64"], "data.max_length: windows of 64 tokens do not fit into the context"),
        (["data.tokenizer=train"], "was not trained on the tokens of a new tokenizer; leave it out"),
        (["checkpoint=nowhere"], "checkpoint: there is no 'nowhere' here"),
        (["data=text", "data.files=[nowhere.txt]"], "no file matches"),
        (["device=tpu"], "is none of auto"),
        (["output=outputs"], "output: outputs is a folder; name a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_is_one_line(trained: Workspace, arguments, complaint):
    (line,) = trained.run("evaluate.py", *arguments, expect=2).stderr.splitlines()
    assert complaint in line


def test_foreign_output_file_is_not_overwritten(trained: Workspace, tmp_path):
    for content in ("notes", "[]", '{"loss": 1}'):
        (tmp_path / "mine.json").write_text(content)
        (line,) = trained.run("evaluate.py", f"output='{tmp_path}/mine.json'", expect=2).stderr.splitlines()
        assert "is not a result of evaluate.py; name another file" in line
        assert (tmp_path / "mine.json").read_text() == content


def test_text_of_one_token_is_refused(trained: Workspace, tmp_path):
    (tmp_path / "a.txt").write_text("")
    done = trained.run("evaluate.py", "data=text", f"data.files=['{tmp_path}/a.txt']", "split=train", expect=2)
    assert "no text in the train split" in done.stderr
