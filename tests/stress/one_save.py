"""Resume a run for one step and save it: `python -m tests.stress.one_save RUN_FOLDER`. Its caller kills it."""

import sys
from pathlib import Path

from gpt2.checkpoint.run_folder import first_intact, newest_first
from gpt2.config import GPT2Config, TrainingConfig
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.model import GPT2Model
from gpt2.tracking.tracker import Tracker
from gpt2.train import Trainer
from gpt2.training.callbacks import TrackerLog


def main(folder: Path) -> None:
    tokens = folder / "tokens.bin"
    if not tokens.exists():
        tokens.write_bytes(bytes(i * i % 61 for i in range(400)))
    blocks = TokenDataset(tokens, "uint8", 16)
    config = TrainingConfig(
        batch_size=4, num_workers=0, warmup_steps=1, learning_rate=1e-2, device="cpu", keep_checkpoints=1
    )
    loader, *_ = get_dataloaders(blocks, blocks, blocks, config)
    model = GPT2Model(GPT2Config(61, 16, 16, 2, 1, 32, 0.1, 0.1, 0.1))
    trainer = Trainer(model, loader, loader, config, str(folder / "checkpoints"), [TrackerLog(Tracker(folder))])
    before = first_intact(newest_first(folder / "checkpoints"))
    if before:
        trainer.load_checkpoint(str(before))
    config.max_steps = trainer.progress.step + 1
    trainer.train()  # one step, an evaluation that is the best so far, and a save


if __name__ == "__main__":
    main(Path(sys.argv[1]))
