"""Fixtures of the tests for a CUDA device. Without a device they are skipped; GPT2_GPU_TESTS=cpu runs them on a CPU.

On a CPU a test does everything that a CPU supports, so that its lines have been executed before they run on a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tests.test_train as training

DEVICE = os.environ.get("GPT2_GPU_TESTS", "cuda")
REASON = "needs a CUDA device (GPT2_GPU_TESTS=cpu runs the test on a CPU)"

blocks = training.blocks  # the fixture

if DEVICE == "cuda":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `train.deterministic`; read at the first product


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    # Count devices with the driver's library, which does not initialize CUDA in this process.
    is_skipped = bool(ours) and DEVICE == "cuda" and torch.cuda.device_count() == 0
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if is_skipped:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of a test that cannot run on a CPU."""
    if device.type != "cuda":
        pytest.skip("a CPU has nothing like it")
    return device


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """Makes CUDA raise an error when the host waits for the device."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    """Restores settings that training changes for the whole process."""
    deterministic, products = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(products)
    torch.compiler.reset()
