"""What a run's numbers depend on beside its configuration and data: random states, algorithms, versions."""

import os
import platform
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RandomState:
    """The state of every global generator: PyTorch's on the CPU and on `device`, Python's, NumPy's."""

    device: torch.device
    tensors: dict[str, Tensor]  # of PyTorch
    elsewhere: dict[str, Any] = field(default_factory=dict)  # plain values, fit for JSON

    @classmethod
    def of_torch(cls, device: torch.device) -> "RandomState":
        """PyTorch's alone: all that a model draws from."""
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            states["mps"] = torch.mps.get_rng_state()
        return cls(device, states)

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        kind, keys, *rest = np.random.get_state(legacy=True)
        elsewhere = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
        return cls(device, cls.of_torch(device).tensors, elsewhere)

    def restore(self) -> None:
        """Set the generators back. A state of a kind of device that is not here is left out."""
        torch.set_rng_state(self.tensors["cpu"])
        if self.device.type == "cuda" and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in self.tensors:
            torch.mps.set_rng_state(self.tensors["mps"])
        if self.elsewhere:
            version, numbers, gauss = self.elsewhere["python"]
            random.setstate((version, tuple(numbers), gauss))
            np.random.set_state(tuple(self.elsewhere["numpy"]))


def seed_of_rank(seed: int, rank: int, step: int = 0) -> int:
    """What a rank seeds its dropout with, so that no two draw the same; rank 0 as if it were alone."""
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])


def make_deterministic() -> None:
    """Have PyTorch use algorithms only that give the same bits each time, or raise where there is none.

    On a CPU they do so anyway, for the same number of threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when the device is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def commit() -> dict[str, Any] | None:
    """Of this repository: the commit that is checked out, and whether tracked files differ from it; None if unknown."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):  # a copy without its history, or a machine without git
        return None
    return {"commit": head, "dirty": bool(changes)}


def versions() -> dict[str, str | None]:
    """Of what the last bits of a number may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
    }
