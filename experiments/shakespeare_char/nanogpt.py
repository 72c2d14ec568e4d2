"""Write the loss of nanoGPT's last checkpoint over the whole validation split to nanogpt.json or to another file.

The split is divided into blocks as in this repository.

In a clone of https://github.com/karpathy/nanoGPT, then in this repository:

    python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char.py --device=cpu \
        --compile=False --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 \
        --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --eval_interval=500
    python experiments/shakespeare_char/nanogpt.py ../nanoGPT
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from gpt2.runtime.device import hardware

place = Path(sys.argv[1])
sys.path.insert(0, str(place))
from model import GPT, GPTConfig  # noqa: E402  # nanoGPT's

saved = torch.load(place / "out-shakespeare-char" / "ckpt.pt")
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict(saved["model"])

tokens = np.fromfile(place / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16).astype(np.int64)
length, nats = saved["model_args"]["block_size"], 0.0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, length):
        block = torch.from_numpy(tokens[start : start + length + 1])[None]
        _, loss = model(block[:, :-1], block[:, 1:])
        nats += loss.item() * (block.size(1) - 1)

result = {
    "step": saved["iter_num"],
    "loss": nats / (len(tokens) - 1),  # nats a character
    "estimate": float(saved["best_val_loss"]),  # nanoGPT's own, over 20 random batches
    "config": saved["config"],
    "torch": torch.__version__,
    "hardware": hardware(torch.device("cpu")),
}
written = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("nanogpt.json")
written.write_text(json.dumps(result, indent=1) + "\n")
print(f"step {result['step']:,}: {result['loss']:.4f} nats a character")
