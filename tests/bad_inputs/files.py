"""Bad files for the tables of tests."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARAGRAPH = "A line of text that says nothing.\n"

# ---------------------------------------------------------------------------------------------------------------------
# Texts

TEXTS: dict[str, bytes] = {
    "empty.txt": b"",
    "blank.txt": b" \n\t\n" * 100,
    "one_token.txt": b"a",
    "mark_only.txt": b"\xef\xbb\xbf",
    "not_utf8.txt": PARAGRAPH.encode() * 50 + b"caf\xe9\n" + PARAGRAPH.encode() * 50,
    "first_byte.txt": b"\xff" + PARAGRAPH.encode() * 50,
    "last_byte.txt": PARAGRAPH.encode() * 50 + "é".encode()[:1],
    "utf16.txt": (PARAGRAPH * 50).encode("utf-16"),
    "utf16_without_mark.txt": (PARAGRAPH * 50).encode("utf-16-le"),
    "utf32.txt": (PARAGRAPH * 50).encode("utf-32"),
    "nul.txt": b"\0" * 4096,
    "gzip.txt": gzip.compress(os.urandom(2000)),
    "parquet.txt": b"PAR1" + os.urandom(2000) + b"PAR1",
    "picture.txt": b"\x89PNG\r\n\x1a\n" + os.urandom(2000),
    "tokens.bin": os.urandom(2000),
    "esc\x1b[31m.txt": b"\xff" * 50,
}


def write_texts(folder: Path) -> None:
    for name, content in TEXTS.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "dangling.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "unreadable.txt").write_text(PARAGRAPH)
    (folder / "unreadable.txt").chmod(0)
    (folder / "closed").mkdir()
    (folder / "closed" / "a.txt").write_text(PARAGRAPH)
    (folder / "closed").chmod(0o555)
    dataset = folder / "dataset"
    dataset.mkdir()
    (dataset / "train.csv").write_text("body,number\n" + "some text,1\n" * 50)


PRESETS: dict[str, str | bytes] = {
    "open_bracket": "train: [1, 2\n",
    "tab": "train:\n\tseed: 1\n",
    "no_colon": "train\n",
    "a_list": "- train\n- seed\n",
    "twice": "name: a\nname: b\n",
    "latin1": b"name: caf\xe9\n",
    "nul": b"name: a\0b\n",
    "missing_file": "data:\n  files: [nowhere.txt]\n",
    "missing_group_file": "defaults:\n  - override /model: gtp2\n",
    "missing_group": "defaults:\n  - override /modle: gpt2\n",
    "target": "train:\n  _target_: os.system\n",
    "target_at_the_top": "_target_: os.system\n",
    "unknown_key": "train:\n  sede: 1\n",
    "wrong_type": "train:\n  seed: one\n",
    "wrong_range": "train:\n  batch_size: 0\n",
    "a_word_for_a_group": "train: fast\n",
    "interpolation_of_nothing": "sample_prompt: ${nowhere}\n",
    "circle": "sample_prompt: ${sample_prompt}\n",
    "no_resolver": "train:\n  seed: ${random:}\n",
    "division_by_zero": "train:\n  max_steps: ${divide:1,0}\n",
}


def write_presets(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in PRESETS.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / f"{name}.yaml").write_bytes(b"# @package _global_\n" + content)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

PROMPTS: dict[str, bytes] = {
    "nothing.txt": b"",
    "blank_lines.txt": b"\n \n\t\n",
    "latin1.txt": b"caf\xe9\n",
    "utf16_prompts.txt": "a prompt\n".encode("utf-16"),
    "empty.jsonl": b"",
    "not_json.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
    "a_list.jsonl": b'["a"]\n',
    "a_text.jsonl": b'"a"\n',
    "no_prompt.jsonl": b'{"text": "a"}\n',
    "a_number.jsonl": b'{"prompt": 5}\n',
    "null.jsonl": b'{"prompt": null}\n',
    "deep.jsonl": b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "long_number.jsonl": b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}\n",
    "nan.jsonl": b'{"prompt": "a", "x": NaN}\n',
}


def write_prompts(folder: Path) -> None:
    folder.mkdir()
    for name, content in PROMPTS.items():
        (folder / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

Record = dict[str, Any]


def _set(*path: str) -> Callable[..., Callable[[Record], None]]:
    """`_set("a", "b")(value)` changes a record: its value at `a`, `b`."""

    def to(value: Any) -> Callable[[Record], None]:
        def change(record: Record) -> None:
            for key in path[:-1]:
                record = record[key]
            record[path[-1]] = value

        return change

    return to


def _without(*path: str) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


RECORDS: dict[str, Callable[[Record], None]] = {  # with valid checksums
    "step_is_text": _set("progress", "step")("x"),
    "step_is_negative": _set("progress", "step")(-1),
    "progress_is_a_list": _set("progress")([]),
    "no_progress": _without("progress"),
    "run_is_a_list": _set("run")([1]),
    "run_is_text": _set("run")("x"),
    "no_run": _without("run"),
    "no_inference": _without("run", "inference"),
    "inference_is_a_list": _set("run", "inference")([]),
    "unknown_key_in_inference": _set("run", "inference", "heat")(1),
    "temperature_is_text": _set("run", "inference", "temperature")("hot"),
    "temperature_is_negative": _set("run", "inference", "temperature")(-1),
    "no_data": _without("run", "data"),
    "length_is_text": _set("run", "data", "max_length")("long"),
    "tokenizer_is_a_bracket": _set("tokenizer")("{"),
    "tokenizer_is_a_number": _set("tokenizer")(5),
    "tokenizer_is_a_list": _set("tokenizer")("[1]"),
    "tokenizer_is_empty": _set("tokenizer")('{"vocabulary": {}, "merges": []}'),
    "no_tokenizer": _without("tokenizer"),
    "model_is_text": _set("model")("gpt2"),
    "model_is_missing": _without("model"),
    "layers_are_text": _set("model", "num_layers")("two"),
    "layers_are_many": _set("model", "num_layers")(10_000),
    "width_is_huge": _set("model", "d_model")(10**7),
    "heads_do_not_divide": _set("model", "num_heads")(5),
    "vocabulary_of_zero": _set("model", "vocab_size")(0),
    "dropout_is_nan": _set("model", "dropout")(float("nan")),
    "other_format": _set("format")(99),
}


def write_checkpoints(folder: Path, good: Path) -> None:
    """Variants of a good checkpoint: other bytes, or another record under valid checksums."""
    from gpt2.checkpoint import format as checkpoint

    folder.mkdir()
    content, record, tensors = good.read_bytes(), checkpoint.read_record(good), checkpoint.read_tensors(good)
    _, places = checkpoint._read_header(good)
    damaged = {
        "empty": b"",
        "short": content[:1000],
        "cut": content[:-1],
        "longer": content + b"\0",
        "flipped": _flipped(content, places["model/final_norm.bias"].begin),
        "flipped_optimizer": _flipped(content, places["optimizer/exp_avg/final_norm.bias"].begin),
        "flipped_header": _flipped(content, 100),
        "zeroed": bytes(len(content)),
        "text": PARAGRAPH.encode() * 100,
        "pickle": b"\x80\x04\x95",
        "huge_header": (2**60).to_bytes(8, "little") + b"{}",
    }
    for name, changed in damaged.items():
        (folder / f"{name}.pth").write_bytes(changed)
    for name, change in RECORDS.items():
        other = json.loads(json.dumps(record))
        change(other)
        _write(folder / f"{name}.pth", tensors, other)
    for name, spoil in {"nan": float("nan"), "infinite": float("inf")}.items():
        spoiled = {key: tensor.clone() for key, tensor in tensors.items()}
        spoiled["model/final_norm.bias"][0] = spoil
        _write(folder / f"{name}.pth", spoiled, record)
    fewer = {key: tensor for key, tensor in tensors.items() if key != "model/final_norm.bias"}
    _write(folder / "no_bias.pth", fewer, record)
    transposed = {
        key: t.T.contiguous() if key == "model/blocks.0.attention.qkv.weight" else t for key, t in tensors.items()
    }
    _write(folder / "transposed.pth", transposed, record)
    (folder / "loop.pth").symlink_to("loop.pth")
    os.mkfifo(folder / "pipe.pth")
    (folder / "empty_folder").mkdir()


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _write(path: Path, tensors: Record, record: Record) -> None:
    from gpt2.checkpoint import format as checkpoint

    checkpoint.write_checkpoint(path, tensors, record)


CONFIGS: dict[str, Callable[[Record], None]] = {
    "other_model": _set("model_type")("llama"),
    "other_activation": _set("activation_function")("relu"),
    "many_layers": _set("n_layer")(3000),
    "negative_width": _set("n_embd")(-1),
    "text_for_a_size": _set("n_head")("four"),
    "size_is_a_list": _set("vocab_size")([257]),
}


def write_hugging_face_folders(folder: Path, good: Path) -> None:
    """Variants of a folder of `transformers`."""
    folder.mkdir()
    for name, change in CONFIGS.items():
        shutil.copytree(good, folder / name)
        config = json.loads((good / "config.json").read_text())
        change(config)
        (folder / name / "config.json").write_text(json.dumps(config))
    contents = {
        "config_is_a_list": ("config.json", b"[]"),
        "config_is_cut": ("config.json", (good / "config.json").read_bytes()[:50]),
        "config_is_latin1": ("config.json", b'{"model_type": "\xe9"}'),
        "weights_are_cut": ("model.safetensors", (good / "model.safetensors").read_bytes()[:-100]),
        "weights_are_empty": ("model.safetensors", b""),
        "tokenizer_is_cut": ("tokenizer.json", b"{"),
        "tokenizer_is_other": ("tokenizer.json", b'{"model": {"type": "WordPiece"}}'),
    }
    for name, (file, content) in contents.items():
        shutil.copytree(good, folder / name)
        (folder / name / file).write_bytes(content)
    shutil.copytree(good, folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(good, folder / "only_a_pickle")
    (folder / "only_a_pickle" / "model.safetensors").rename(folder / "only_a_pickle" / "pytorch_model.bin")
