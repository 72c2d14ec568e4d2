"""Time the attention of one new token to cached keys and values in bf16 and in fp32, for GPT-2 124M on a CPU.

python experiments/generation/attention.py --json experiments/generation/attention.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpt2.runtime.device import fastest_seconds, hardware

HEADS, WIDTH, LENGTH = 12, 64, 1024
REPETITIONS, THREADS = 50, 2


@torch.no_grad()
def measure(texts: int, tokens: int) -> dict[str, Any]:
    """Time one block's attention. In fp32, this includes converting the query to fp32 and the result to bf16."""
    query = torch.randn(texts, HEADS, 1, WIDTH, dtype=torch.bfloat16)
    half = torch.randn(2, texts, HEADS, LENGTH, WIDTH, dtype=torch.bfloat16)[:, :, :, :tokens]
    full = half.float()

    def in_bf16() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, half[0], half[1])

    def in_fp32() -> torch.Tensor:
        return F.scaled_dot_product_attention(query.float(), full[0], full[1]).bfloat16()

    bf16, fp32 = fastest_seconds([in_bf16, in_fp32], REPETITIONS)
    return {"texts": texts, "tokens": tokens, "bf16_seconds": bf16, "fp32_seconds": fp32, "ratio": bf16 / fp32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = [measure(texts, tokens) for texts in (1, 8) for tokens in (64, 128, 512, 1000)]
    for row in rows:
        seconds = f"bf16 {row['bf16_seconds'] * 1e6:.0f} us, fp32 {row['fp32_seconds'] * 1e6:.0f} us"
        print(f"{row['texts']} texts of {row['tokens']:>4} tokens: {seconds}, {row['ratio']:.1f} times as long in bf16")
    about = {"machine": hardware(torch.device("cpu")), "torch": torch.__version__}
    options.json.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
