"""Time each layout of a weight in `gpt2/ops/cpu_inference.py`, and compare the one that `kind_for` chooses.

python experiments/generation/layouts.py --json experiments/generation/layouts.json
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from gpt2.ops.cpu_inference import InferenceLinear, PackedLinear, SlicedLinear, kind_for
from gpt2.ops.linear import is_available
from gpt2.runtime.device import fastest_seconds, hardware

WIDTHS, TEXTS, OUTPUTS = (384, 768, 1600), (1, 2, 4, 6, 8, 16, 32), 16_384
REPETITIONS, THREADS = 20, 1
LAYOUTS = {
    torch.float32: (InferenceLinear, SlicedLinear, PackedLinear),
    torch.bfloat16: (InferenceLinear, PackedLinear),
}


@torch.no_grad()
def measure(dtype: torch.dtype, width: int, texts: int) -> dict:
    """Return the shortest time of a product in each layout, over interleaved repetitions."""
    weight, x = torch.randn(OUTPUTS, width, dtype=dtype), torch.randn(texts, 1, width, dtype=dtype)
    kinds = [kind for kind in LAYOUTS[dtype] if kind is not PackedLinear or is_available(dtype)]
    seconds = fastest_seconds([partial(kind(weight), x) for kind in kinds], REPETITIONS)
    taken = {kind.__name__: each for kind, each in zip(kinds, seconds, strict=True)}
    chosen = kind_for(dtype, texts).__name__
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "width": width,
        "texts": texts,
        "seconds": taken,
        "chosen": chosen,
        "of_f_linear": taken[chosen] / taken[InferenceLinear.__name__],
        "of_best": taken[chosen] / min(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    cases = [(dtype, width, texts) for dtype in LAYOUTS for width in WIDTHS for texts in TEXTS]
    rows = [measure(*case) for case in cases]
    for row in rows:
        of = f"{row['of_f_linear']:.2f} of F.linear, {row['of_best']:.2f} of the best"
        print(f"{row['dtype']:<9}{row['width']:>5}{row['texts']:>4} texts  {row['chosen']:<16}{of}")
    about = {"machine": hardware(torch.device("cpu")), "torch": torch.__version__, "threads": THREADS}
    options.json.write_text(json.dumps({**about, "outputs": OUTPUTS, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
