"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

import json
import runpy
from pathlib import Path
from statistics import median

FOLDER, IMPORT = Path(__file__).parent, "python -c 'import torch'"


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def rows_of(name):
    return {row["contestant"]: row for row in recorded(name)["results"]}


SHAPES = ("gpt2", "small", "shakespeare")
MODELS, AMX = ([rows_of(name + machine) for name in SHAPES] for machine in ("", "_amx"))
seconds_of_each = [[row["step_seconds_of_each"] for row in model.values()] for model in MODELS]
spreads = [100 * median((max(each) - min(each)) / median(each) for each in model) for model in seconds_of_each]


def to_best(model, ours):
    """The speed of our contestant relative to the fastest nanoGPT in the same number format."""
    peers = [row for name, row in model.items() if name.startswith("nanoGPT") and name.endswith(ours[-4:])]
    return min(row["step_seconds"] for row in peers) / model[ours]["step_seconds"]


bf16, compiled, fp32, fp32_compiled = (
    [f"{to_best(model, ours):.2f}" for model in MODELS]
    for ours in ("gpt2, bf16", "gpt2, compiled, bf16", "gpt2, fp32", "gpt2, compiled, fp32")
)
amx = {name: [f"{to_best(model, f'gpt2, {name}'):.2f}" for model in AMX] for name in ("bf16", "compiled, bf16", "fp32")}
COMPARED = {"bf16": bf16, "compiled": compiled, "fp32": fp32}
unmodified = {f"{model['gpt2, bf16']['ratio']:.1f}" for model in MODELS[:2]}
best_mfu = [
    max(row["mfu"] for name, row in model.items() if name.startswith("nanoGPT") and name.endswith(form))
    for model in MODELS[:2]
    for form in ("fp32", "bf16")
]
peaks = {form: [recorded(name)["peak_flops"][form] / 1e9 for name in ("gpt2", "small")] for form in ("fp32", "bf16")}
large = rows_of("small_batch_16")
memory = [large[name]["peak_memory_bytes"] / 1e6 for name in ("gpt2, fp32", "gpt2, bf16", "nanogpt, fp32")]
waiting = [recorded(name)["waiting"]["waiting_for_data"] for name in ("small_batch_16", "overhead")]
levers = {
    form: {k: median(v) for k, v in each.items()} for form, each in recorded("levers_small")["step_seconds"].items()
}
overhead = recorded("overhead")["overhead"]
start = {row["what"]: row for row in recorded("startup")["results"]}
data = recorded("data")
theirs, ours = data["results"]


def lever(label, *names):
    cells = []
    for form in ("fp32", "bf16"):
        known = [levers[form][name] for name in names if name in levers[form]]
        cells.append(", ".join(f"{1e3 * seconds:.1f}" for seconds in known))
        cells.append(", ".join(f"{seconds / levers[form]['all']:.2f}" for seconds in known))
    return " ".join(f"| {label} | {' | '.join(cells)} |".split())


def speeds(row):
    each = [speed / 1e6 for speed in row["tokens_per_second_of_each"]]
    return row["tokens_per_second"] / 1e6, min(each), max(each)


FIGURES = [
    f"is {unmodified.pop()} times as fast as one of unmodified nanoGPT",
    "it is {}, {} and {} times as fast, and compiled {}, {} and {}".format(*bf16, *compiled),
    f"In fp32 it is {fp32[0]} and {fp32[1]} times as fast, and for the smallest model {fp32[2]} times (compiled "
    f"{fp32_compiled[2]})",
    f"already uses {100 * min(best_mfu):.0f} to {100 * max(best_mfu):.0f} % of the peak",
    *(" ".join(part.split()) for part in runpy.run_path(str(FOLDER / "table.py"))["tables"]().split("\n\n")),
    "{:.0f} and {:.0f} GFLOP/s in fp32".format(*peaks["fp32"]) + ", {:.0f} and {:.0f} in bf16".format(*peaks["bf16"]),
    f"the peak memory is {memory[0]:,.0f} MB in fp32 and {memory[1]:,.0f} in bf16, against nanoGPT's {memory[2]:,.0f}: "
    f"{memory[0] / memory[2]:.2f} and {memory[1] / memory[2]:.2f} of it",
    f"that run, {large['gpt2, fp32']['ratio']:.2f} and {large['gpt2, bf16']['ratio']:.2f}",
    lever("everything", "all"),
    lever("matrix products by PyTorch's BLAS instead of oneDNN", "products by PyTorch's BLAS"),
    "| bf16 instead of fp32 | {:.1f} | {:.2f} |".format(
        1e3 * levers["bf16"]["all"], levers["bf16"]["all"] / levers["fp32"]["all"]
    ),
    lever("logits of the whole batch at once (chunks save memory)", "logits of the whole batch"),
    lever("chunks of 32, 64, 128 MiB instead of 96", *(f"chunks of {size} MiB" for size in (32, 64, 128))),
    lever("softmax of a whole chunk at once", "softmax of a whole chunk"),
    lever("vocabulary not padded", "vocabulary not padded"),
    lever("PyTorch's attention", "PyTorch's attention"),
    lever("AdamW in a loop, foreach, instead of fused", "AdamW in a loop", "AdamW foreach"),
    lever("compiled (on a CPU it excludes oneDNN's fp32 products)", "compiled"),
    f"costs {100 * overhead['overhead']:.1f} % more ({100 * min(overhead['overhead_of_each']):.1f} % to "
    f"{100 * max(overhead['overhead_of_each']):.1f} %), {1e3 * overhead['train_step_seconds']:.1f} ms a step and "
    f"{1e3 * overhead['bare_step_seconds']:.1f} ms bare",
    f"during {100 * min(waiting):.2f} to {100 * max(waiting):.1f} % of",
    *(
        f"{label} {start[what]['seconds']:.2f} s ({min(start[what]['seconds_of_each']):.2f} at best)"
        for label, what in (("--help`", "train.py --help"), ("the command", "train.py, a mistake"))
    ),
    "with prepared data {:.1f} s, its end after evaluation and saving {:.1f} s".format(
        *(start[f"train.py, one step: to {what}"]["seconds"] for what in ("its line", "the end"))
    ),
    f"alone takes {start[IMPORT]['seconds']:.1f} s",
    f"{data['tokens'] / 1e6:.2f} million tokens of Python's library",
    "{:.1f} million tokens per second ({:.1f} to {:.1f}) against".format(*speeds(ours))
    + " {:.2f} ({:.2f} to {:.2f})".format(*speeds(theirs)),
    f"{ours['ratio']:.1f} times as fast, the same tokens",
    "differ by {:.0f}, {:.0f} and {:.0f} % of their median".format(*spreads),
    "products of 2048 x 2048 matrices reach {:.1f} TFLOP/s in bf16".format(
        max(recorded(f"{name}_amx")["peak_flops"]["bf16"] for name in SHAPES) / 1e12
    ),
    "a step in bf16 is {}, {} and {} times as fast as one of the fastest nanoGPT, and compiled {}, {} and {}".format(
        *amx["bf16"], *amx["compiled, bf16"]
    ),
    "in fp32 {}, {} and {}".format(*amx["fp32"]),
]
percent = {name: [f"{100 * (float(each) - 1):.0f}" for each in known] for name, known in COMPARED.items()}
quickstart = recorded("quickstart")
ELSEWHERE = {
    "README.md": [
        f"takes {quickstart['seconds']:.0f} s on two cores of an AMD EPYC, "
        f"{recorded('quickstart_avx2')['seconds']:.0f} s on an older one without bf16"
    ],
    "docs/training.md": [f"| `quickstart` | {quickstart['evaluations'][-1]['val/loss']:.2f} |"],
    "docs/performance.md": [
        "the gain is {}, {} and {} % for the three models".format(*percent["bf16"]),
        "and {}, {} and {} % with `train.compile=true`".format(*percent["compiled"]),
        "In fp32 it is {} and {} % for the larger two".format(*percent["fp32"][:2]),
        "in bf16 is {}, {} and {} times as fast".format(*amx["bf16"]),
        f"packed {ours['ratio']:.1f} times as fast as with `GPT2TokenizerFast`",
        f"takes {start['train.py --help']['seconds']:.2f} s, a mistake in the command is reported after "
        f"{start['train.py, a mistake']['seconds']:.2f} s",
        f"is done after {start['train.py, one step: to its line']['seconds']:.1f} s",
    ],
}
GIVEN = [
    "2048 x 2048",
    "With 16 blocks",
    "4 blocks of 256 tokens. Above 1.00, the",
    "Medians of 5 interleaved repetitions",
    "(medians of 5,",
    "a vocabulary of 8,192",
    "step 1 of",
    "vocabulary of 4,096",
    "2 cores of an AMD EPYC (Zen 4: AVX-512",
    "PyTorch 2.13.0 (CPU, MKL and oneDNN), transformers 5.24.0, Python 3.11.7, 30 November 2026",
    "23 November 2026",
    "differences under 5 % mean",
    "a multiple of 128 inside",
    "1 December 2026",
    "chunks of 256 MiB",
]
