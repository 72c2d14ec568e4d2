"""Computes the figures of README.md from the data. tests/experiments/test_figures.py compares the two."""

import json
from pathlib import Path

from gpt2.analysis.tables import from_to

FOLDER = Path(__file__).parent


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def of_cpu(row):
    cells = [
        row["contestant"].replace("gpt2, ", "this repository, ").replace("static,", "static cache,"),
        f"{row['tokens_per_second']:,.1f}",
        from_to(row["tokens_per_second_of_each"], 1),
        f"{row['ratio']:.2f}",
        f"{row['share_of_floor']:.0%}",
        f"{1e3 * row['prefill_seconds']:,.0f}",
        f"{row['same_tokens']:.0%}",
        row["layout"],
    ]
    return f"| {' | '.join(cells)} |"


def of_lookup(row):
    speeds = row["tokens_per_second"], row["tokens_per_second_with_lookup"]
    cells = [row["format"], row["sampling"], *(f"{speed:,.0f}" for speed in speeds), f"{row['ratio']:.2f}"]
    cells += [f"{row['tokens_per_pass']:.2f}", f"{row['accepted'] / row['drafted']:.0%}"]
    return f"| {' | '.join(cells)} |"


def of_both_batches(name):
    """A row of docs/performance.md."""
    cells = [f"{one[name]['tokens_per_second']:.1f}", f"{one[name]['ratio']:.2f}", "", ""]
    if name in eight:
        cells[2:] = f"{eight[name]['tokens_per_second']:.0f}", f"{eight[name]['ratio']:.2f}"
    return " ".join(f"| {of_cpu(one[name]).split(' | ')[0][2:]} | {' | '.join(cells)} |".split())


cpu = recorded("cpu")["results"]
ratio = {(row["contestant"], row["batch_size"]): row["ratio"] for row in cpu}
one, eight = ({row["contestant"]: row for row in cpu if row["batch_size"] == size} for size in (1, 8))
floor = {name: f"{100 * row['share_of_floor']:.0f} %" for name, row in one.items()}
pairs = {name: [f"{ratio[f'gpt2, {name}', size]:.1f}" for size in (1, 8)] for name in ("fp32", "bf16", "int8", "int4")}
avx2 = {(row["contestant"].removeprefix("gpt2, "), row["batch_size"]): row for row in recorded("cpu_avx2")["results"]}
avx2_ratios = {kind: [f"{avx2[kind, size]['ratio']:.1f}" for size in (1, 8)] for kind in ("fp32", "bf16", "int8")}
prefill = avx2["bf16", 1]["prefill_seconds"] / avx2["fp32", 1]["prefill_seconds"]
assert avx2["bf16", 8]["tokens_per_second"] < avx2["fp32", 8]["tokens_per_second"]
for size in (1, 8):
    plain = [kind for kind, of in avx2 if of == size and "lookup" not in kind]
    assert max(plain, key=lambda kind: avx2[kind, size]["tokens_per_second"]) == "int8"
attention = [row["ratio"] for row in recorded("attention")["results"]]
layouts = recorded("layouts")["results"]
slower = [row["of_best"] for row in layouts if row["of_best"] > 1]
lookups = recorded("speculation")["results"]
perplexity = {name: recorded(f"quickstart_{name}")["perplexity"] for name in ("fp32", "int8", "int4")}
assert all(row["same_texts"] for row in lookups)
assert perplexity["int4"] < 1.02 * perplexity["fp32"]
assert min(row["ratio"] for row in lookups if row["sampling"].startswith("temperature 1,")) > 1 - 1 / 5.5
assert recorded("layouts")["threads"] == 1

FIGURES = [
    f"is {pairs['fp32'][0]} times as fast for one text and {pairs['fp32'][1]} times for eight. bf16 is "
    f"{pairs['bf16'][0]} and {pairs['bf16'][1]} times as fast, int8 {pairs['int8'][0]} and {pairs['int8'][1]} times, "
    f"int4 {pairs['int4'][0]} and {pairs['int4'][1]} times",
    f"in fp32 one text is at {floor['gpt2, fp32']} of what reading the weights allows, where `transformers` is at "
    f"{floor['transformers, static, compiled']}",
    *map(of_cpu, cpu),
    f"int8 is the fastest: {avx2_ratios['int8'][0]} times as fast as `transformers` at its best for one text, "
    f"{avx2_ratios['int8'][1]} times for eight. In fp32 it is {' and '.join(avx2_ratios['fp32'])} times",
    f"One text is {avx2_ratios['bf16'][0]} times as fast as with `transformers`, but its prompt takes {prefill:.1f} "
    "times as long as in our fp32",
    "{fp32:.2f} in fp32 and {int8:.2f} in int8".format(**recorded("quickstart_avx2")["perplexity"]),
    *(
        f"Batch {size}, memory bandwidth measured at {speed / 1e9:.1f} GB/s:"
        for size, speed in {row["batch_size"]: row["read_bytes_per_second"] for row in cpu}.items()
    ),
    f"the fastest for one text in fp32: {floor['gpt2, fp32']} of the floor",
    f"attention of a new token takes {min(attention):.1f} to {max(attention):.1f} times as long in bf16",
    f"{ratio['gpt2, int8', 1] / ratio['gpt2, fp32', 1]:.1f} times the speed of fp32 for one text; perplexity of a "
    f"model of half a million parameters on the whole validation split {perplexity['fp32']:.3f} -> "
    f"{perplexity['int8']:.3f}",
    f"perplexity {perplexity['fp32']:.3f} -> {perplexity['int4']:.3f}, "
    f"{100 * (perplexity['int4'] / perplexity['fp32'] - 1):.1f} % more",
    *map(of_lookup, lookups),
    f"the fastest in {len(layouts) - len(slower)} of {len(layouts)} cases, and within "
    f"{100 * (max(slower) - 1):.0f} % of the fastest in the other {len(slower)}".replace("other 2", "other two"),
]
GIVEN = [
    "124M",
    "two cores of Zen 3 (AVX2 only; 48 new tokens, medians of 3",
    "int8 inputs have 7 bits",
    "prompts of 64 tokens, 128 new tokens, greedy, medians of 5 interleaved repetitions",
    "slices of 32 outputs",
    "an offset per 128 inputs",
    "30 November 2026",
    "(2 layers, width 128, context 128, the quickstart of commit `2c6ccda`) continues four beginnings "
    "of Python files by 200 tokens",
    "2 threads",
    "at a temperature of 1 hardly",
    "2 cores of an AMD EPYC (AVX-512, bf16, VNNI)",
    "PyTorch 2.13.0 (CPU), transformers 5.24.0, Python 3.11.7",
]
ELSEWHERE = {
    "gpt2/generation/kv_cache.py": [f"{min(attention):.1f} to {max(attention):.1f} times as long in bf16"],
    "gpt2/ops/cpu_inference.py": [f"slower in {len(layouts) - len(slower)} of {len(layouts)} cases"],
    "docs/performance.md": [
        *map(of_both_batches, one),
        "AVX-512, it is {} and {} in fp32, {} and {} in int8".format(*avx2_ratios["fp32"], *avx2_ratios["int8"]),
        f"from {perplexity['fp32']:.3f} to {perplexity['int8']:.3f}, int4 to {perplexity['int4']:.3f}",
    ],
}
