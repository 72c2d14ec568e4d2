"""Reproducibility: states of random generators, deterministic algorithms, the commit and versions of libraries."""

import os
import platform
import random
import subprocess
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.runtime.repository import ROOT


@dataclass
class RandomState:
    """The states of the global generators of PyTorch (CPU and `device`), Python and NumPy."""

    device: torch.device
    tensors: dict[str, Tensor]  # the states of PyTorch, by device type
    elsewhere: dict[str, Any] = field(default_factory=dict)  # the states of Python and NumPy, as JSON values

    @classmethod
    def of_torch(cls, device: torch.device) -> "RandomState":
        """The states of PyTorch only, whose generators dropout uses."""
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
        """Set the generators to these states. The state of a device of another type is ignored."""
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
    """The seed of a rank's dropout: different on each rank, and `seed` itself on rank 0."""
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])


def make_deterministic() -> None:
    """Make PyTorch use deterministic algorithms; operations without one raise an error.

    On a CPU, operations are deterministic anyway for the same number of threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when the device is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def commit() -> dict[str, Any] | None:
    """The checked-out commit of this repository and whether tracked files differ from it; None if unknown."""
    git = ["git", "-C", str(ROOT)]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    return {"commit": head, "dirty": bool(changes)}


def versions() -> dict[str, str | None]:
    """The versions of Python and the libraries that the last bits of a result may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
    }
