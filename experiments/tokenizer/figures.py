"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

from pathlib import Path
from statistics import mean

from gpt2.experiments.results import Results

FOLDER = Path(__file__).parent
results = Results(FOLDER)
cells = {(cell.value_of("variant"), cell.value_of("train.max_steps")): cell for cell in results.cells}
bits = {setting: mean(cell.results) for setting, cell in cells.items()}
flops = {setting: cell.value_of("flops") for setting, cell in cells.items()}
read = {setting: cell.value_of("text_bytes") for setting, cell in cells.items()}
of_token = [read[name, 800] / cells[name, 800].value_of("tokens") for name in ("bpe_1k", "bpe_4k", "bpe_16k")]
good, worse, worst = sorted(cells["bpe_4k", 800].results)
width, context = 128, 128
transformer = cells["bytes", 800].value_of("parameters") - (257 + context) * width  # without the embeddings
for fewer, more in ((200, 400), (400, 800)):
    assert f"{flops['bpe_4k', fewer]:.1e}" == f"{flops['bytes', more]:.1e}"
assert all(bits["bpe_16k", steps] == min(bits[name, steps] for name, _ in bits) for steps in (200, 400, 800))

FIGURES = [
    f"with {flops['bpe_4k', 200]:.1e} operations, 4,096 tokens (200 steps) end at {bits['bpe_4k', 200]:.2f} bits per "
    f"byte and bytes (400 steps) at {bits['bytes', 400]:.2f}; with {flops['bpe_4k', 400]:.1e}, at "
    f"{bits['bpe_4k', 400]:.2f} and {bits['bytes', 800]:.2f}".replace("e+", "e"),
    f"with {flops['bpe_16k', 400]:.1e} operations they end at {bits['bpe_16k', 400]:.2f}, where 4,096 tokens end at "
    f"{bits['bpe_4k', 800]:.2f} with {flops['bpe_4k', 800]:.1e}".replace("e+", "e"),
    f"its step reads {read['bpe_16k', 800] / read['bytes', 800]:.1f} times the text of a step of bytes; it also costs "
    f"{flops['bpe_16k', 800] / flops['bytes', 800]:.1f} times as much",
    f"One seed of 4,096 tokens is {worst - worse:.2f} worse",
    f"stands for {of_token[0]:.1f}, {of_token[1]:.1f} and {of_token[2]:.1f} bytes",
    f"The transformer has {transformer:,.0f} parameters",
    f"{16384 * width / 1e6:.1f} million",
]
GIVEN = [
    "two layers of width 128, four tokenizers: bytes, and byte-level BPE of 1,024, 4,096 and 16,384 tokens",
    "200, 400 and 800 steps of 8 blocks of 128 tokens at a learning rate of 0.004",
    "6 per multiplied weight",
    "(2 % of the files of Python's standard library)",
    "16,384 tokens are too many",
    "Which of 1,024 and 4,096 tokens is better. The warm-up of the runs is 20, 40 or 80 steps long",
    "the output layer of 16,384 tokens",
    "GPT-2 has 50,257 tokens",
    "all have 0.004",
]
