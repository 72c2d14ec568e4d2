"""The folder that all rows share, because they leave nothing behind: a finished run and all bad files."""

import shutil
from pathlib import Path

import pytest

from tests.bad_inputs import files
from tests.conftest import TEXT, Workspace


@pytest.fixture(scope="session")
def place(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("bad_inputs") / "place"
    folder.mkdir()
    (folder / "corpus.txt").write_text(TEXT)
    place = Workspace(folder)
    shutil.copytree(trained.folder / "outputs", folder / "outputs")
    (run,) = place.runs()
    run.rename(run.with_name("run"))
    files.write_texts(folder)
    files.write_prompts(folder / "prompts")
    files.write_presets(folder / "outputs" / "sweeps" / "mine")
    return place


@pytest.fixture(scope="session")
def checkpoint(place: Workspace) -> Path:
    return place.folder / "outputs/runs/gpt2/run/checkpoints/last.pth"


@pytest.fixture(scope="session")
def bad_checkpoints(place: Workspace, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Writes `bad/` and `theirs/`."""
    from gpt2.checkpoint import pretrained

    files.write_checkpoints(place.folder / "bad", checkpoint)
    good = tmp_path_factory.mktemp("exported") / "good"
    pretrained.export(pretrained.open_model(str(checkpoint)), good)
    files.write_hugging_face_folders(place.folder / "theirs", good)
    damaged = place.folder / "damaged_run" / "checkpoints"
    damaged.mkdir(parents=True)
    shutil.copy(place.folder / "bad" / "flipped_optimizer.pth", damaged / "last.pth")
