"""Checkpoints, folders of `transformers` and run folders that are missing, damaged, forged or of another kind."""

from tests.bad_inputs.files import CONFIGS, RECORDS
from tests.bad_inputs.harness import check, rows

DAMAGED = [
    ("a file that is not there", "nowhere", "checkpoint: there is no 'nowhere' here"),
    ("an empty name", "''", "checkpoint: there is no ''"),
    ("a folder without a checkpoint", "folder", "checkpoint: folder holds no best_model.pth"),
    ("a text", "bad/text.pth", "checkpoint: bad/text.pth"),
    ("an empty file", "bad/empty.pth", "checkpoint: bad/empty.pth"),
    ("the beginning of a file", "bad/short.pth", "checkpoint: bad/short.pth"),
    ("a file without its last byte", "bad/cut.pth", "checkpoint: bad/cut.pth is damaged: it has ... bytes instead of"),
    ("a file with a byte more", "bad/longer.pth", "checkpoint: bad/longer.pth is damaged: it has"),
    ("a flipped bit", "bad/flipped.pth", "checkpoint: bad/flipped.pth is damaged: wrong checksum of"),
    ("a flipped bit in the header", "bad/flipped_header.pth", "checkpoint: bad/flipped_header.pth"),
    ("zeros", "bad/zeroed.pth", "checkpoint: bad/zeroed.pth"),
    ("a pickle", "bad/pickle.pth", "checkpoint: bad/pickle.pth"),
    ("a header without an end", "bad/huge_header.pth", "checkpoint: bad/huge_header.pth"),
    ("a loop of links", "bad/loop.pth", "checkpoint: ... bad/loop.pth"),
    ("a named pipe", "bad/pipe.pth", "checkpoint: ... bad/pipe.pth"),
    ("weights that are no numbers", "bad/nan.pth", "bad/nan.pth: ... final_norm.bias"),
    ("infinite weights", "bad/infinite.pth", "bad/infinite.pth: ... final_norm.bias"),
    ("a missing tensor", "bad/no_bias.pth", "bad/no_bias.pth: ... 1 missing: final_norm.bias"),
    ("transposed tensors", "bad/transposed.pth", "bad/transposed.pth: ... misshapen: blocks.0.attention.qkv.weight"),
    ("a model of the Hub without a network", "a/b", "a/b: ... without a network"),
    ("OpenAI's without a network", "gpt2", "gpt2: ... without a network"),
]
KEYS = {  # names in the error line, by the first word of a forged record's name
    "step": "step",
    "progress": "progress",
    "run": "run",
    "no": "",
    "inference": "inference",
    "unknown": "heat",
    "temperature": "temperature",
    "length": "max_length",
    "tokenizer": "tokenizer",
    "model": "model",
    "layers": "layers",
    "width": "",
    "heads": "num_heads",
    "vocabulary": "vocab_size",
    "dropout": "dropout",
    "other": "format 99",
}

FOLDERS = {
    **dict.fromkeys(CONFIGS, ""),
    "config_is_a_list": "config.json",
    "config_is_cut": "config.json",
    "config_is_latin1": "config.json",
    "weights_are_cut": "model.safetensors",
    "weights_are_empty": "model.safetensors",
    "tokenizer_is_cut": "tokenizer",
    "tokenizer_is_other": "tokenizer",
    "no_weights": "model.safetensors",
    "only_a_pickle": "pytorch_model.bin, a pickle",
}


@rows([(what, f"generate prompt=x checkpoint={name}", expected) for what, name, expected in DAMAGED])
def test_damaged_checkpoints(place, bad_checkpoints, row):
    check(place, row)


def reader(name: str) -> str:
    """The command that reads the wrong part of a forged record."""
    return "evaluate wandb=off" if name in ("no_data", "length_is_text") else "generate prompt=x"


@rows(
    [
        (name, f"{reader(name)} checkpoint=bad/{name}.pth", f"bad/{name}.pth ... {KEYS[name.split('_')[0]]}")
        for name in RECORDS
        if name != "temperature_is_negative"
    ]
)
def test_forged_records(place, bad_checkpoints, row):
    check(place, row)


@rows(
    [
        (name, f"generate prompt=x checkpoint=theirs/{name}", f"theirs/{name} ... {expected}")
        for name, expected in FOLDERS.items()
    ]
)
def test_folders_of_transformers(place, bad_checkpoints, row):
    check(place, row)


OTHERS = [
    (
        "a record beyond a range",
        "generate prompt=x checkpoint=bad/temperature_is_negative.pth",
        "inference.temperature: -1.0 is not",
    ),
    ("a run that is not there", "train resume=nowhere", "resume: nowhere is no run folder with a checkpoint"),
    ("a text as a run", "train resume=corpus.txt", "resume: corpus.txt"),
    ("a folder of runs to resume", "train resume=outputs/runs/gpt2", "; the newest run in it is outputs/runs/gpt2/run"),
    (
        "a folder of runs to generate with",
        "generate checkpoint=outputs/runs",
        "; the newest run in it is outputs/runs/",
    ),
    (
        "a folder of runs with all checkpoints",
        "evaluate checkpoint=outputs/runs all_checkpoints=true",
        "all_checkpoints: outputs/runs ... the newest run in it is outputs/runs/",
    ),
    ("a folder without a run", "train resume=folder", "resume: folder is no run folder with a checkpoint"),
    ("fine-tuning of nothing", "train train.init_from=nowhere", "train.init_from: there is no 'nowhere'"),
    ("fine-tuning of a text", "train train.init_from=corpus.txt", "corpus.txt"),
    (
        "fine-tuning of another shape",
        "train train.init_from=outputs/runs/gpt2/run model.num_layers=2",
        "model.num_layers",
    ),
    (
        "fine-tuning with another tokenizer",
        "train train.init_from=outputs/runs/gpt2/run data.tokenizer=train",
        "data.tokenizer: ... leave it out",
    ),
    ("evaluating a damaged one", "evaluate checkpoint=bad/flipped.pth wandb=off", "checkpoint: bad/flipped.pth"),
    ("exporting a damaged one", "export checkpoint=bad/flipped.pth to=exported", "checkpoint: bad/flipped.pth"),
    ("exporting a forged one", "export checkpoint=bad/no_run.pth to=exported", "checkpoint: bad/no_run.pth"),
    ("resuming a damaged one", "train resume=damaged_run", "damaged_run/checkpoints/last.pth"),
    (
        "a file of weights",
        "generate prompt=x checkpoint=theirs/no_weights/../weights_are_cut/model.safetensors",
        "folder",
    ),
]


@rows(OTHERS)
def test_other_scripts(place, bad_checkpoints, row):
    check(place, row)
