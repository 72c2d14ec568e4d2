"""Random states: saved, restored, and independent of each other."""

import json
import random
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gpt2.runtime import rng as reproducibility
from gpt2.runtime.rng import RandomState

CPU = torch.device("cpu")


def draw() -> dict[str, list]:
    """Numbers of every generator. NumPy and Python generate Gaussian numbers in pairs and cache the second."""
    return {
        "python": [random.gauss(0, 1), random.random()],
        "numpy": [np.random.randn(), np.random.rand()],
        "torch": torch.randn(3).tolist(),
    }


@pytest.fixture(autouse=True)
def leave_as_it_was() -> Iterator[None]:
    before = RandomState.now(CPU)
    yield
    before.restore()


@pytest.mark.parametrize("drawn", range(3))  # with and without a cached second number
@pytest.mark.parametrize("through_json", [True, False])
def test_restored_generators_repeat_their_numbers(drawn, through_json):
    for _ in range(drawn):
        draw()
    state = RandomState.now(CPU)
    expected = [draw() for _ in range(400)]  # more than the state has numbers
    elsewhere = json.loads(json.dumps(state.elsewhere)) if through_json else state.elsewhere
    RandomState(CPU, state.tensors, elsewhere).restore()
    assert [draw() for _ in range(400)] == expected
    state.restore()  # drawing has not changed the state
    assert draw() == expected[0]


def test_torch_state_excludes_other_generators():
    state = RandomState.of_torch(CPU)
    first = draw()
    state.restore()
    second = draw()
    assert second["torch"] == first["torch"]
    assert second["python"] != first["python"]
    assert second["numpy"] != first["numpy"]
    assert state.elsewhere == {}


def test_state_of_other_device_is_ignored():
    state = RandomState.of_torch(CPU)
    elsewhere = RandomState(CPU, {**state.tensors, "cuda": torch.zeros(16, dtype=torch.uint8)})
    first = draw()
    elsewhere.restore()
    assert draw()["torch"] == first["torch"]


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    monkeypatch.setattr(reproducibility, "ROOT", tmp_path)
    assert reproducibility.commit() is None  # a copy without history
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = reproducibility.commit()
    assert len(clean["commit"]) == 40
    assert not clean["dirty"]
    (tmp_path / "other").write_text("not tracked")
    assert reproducibility.commit() == clean
    (tmp_path / "file").write_text("b")
    assert reproducibility.commit() == {**clean, "dirty": True}
