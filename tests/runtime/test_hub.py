"""`export push=`, with a fake Hub."""

import subprocess

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from gpt2.errors import ResourceError, UserError
from gpt2.runtime import hub
from tests.conftest import Workspace
from tests.hub_server import TOKEN, HubServer


def export(workspace: Workspace, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    done = workspace.module("gpt2.main", "export", *arguments)
    assert done.returncode == expect, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_push_uploads_what_export_writes_and_nothing_else(trained, tmp_path, monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(
            trained, "environment", trained.environment | {"HF_TOKEN": TOKEN, "HF_ENDPOINT": server.url}
        )
        done = export(trained, "push=me/first", f"to={tmp_path / 'pushed'}", "license=mit", "language=en de")
        assert server.created["me/first"]["visibility"] == "private"
        pushed = {path.name: path.read_bytes() for path in (tmp_path / "pushed").iterdir()}
        assert server.repositories["me/first"] == pushed
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= pushed.keys()
        assert f"is now on the Hugging Face Hub: {server.url}/me/first/commit/" in done.stdout
        assert "pipeline('text-generation', 'me/first')" in done.stdout
        card = ModelCard(pushed["README.md"].decode())
        assert (card.data.license, card.data.language) == ("mit", ["en", "de"])
        assert 'pipeline("text-generation", "me/first")' in card.content

        before = sorted(trained.folder.iterdir())
        again = export(trained, "push=me/first")  # the repository exists, and no `to` is given
        assert "To state licence and language in the model card, add them: license=mit language=en" in again.stdout
        assert server.repositories["me/first"].keys() == pushed.keys()
        assert sorted(trained.folder.iterdir()) == before

        server.refuses = ("/api/repos/create", 403, "You don't have the rights")
        refused = export(trained, "push=them/first", "to=refused", expect=2)
        assert refused.stderr.startswith(
            "error: push: the Hugging Face Hub does not let you write to them/first; perhaps"
        )
        assert "You don't have the rights" in refused.stderr
        assert not (trained.folder / "refused").exists()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        yield server


def test_public_repository(server):
    hub.create_repository("me/open", private=False)
    assert server.created["me/open"]["visibility"] == "public"


def test_push_without_a_login(server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="push: not logged in to the Hugging Face Hub: run `hf auth login`"):
        hub.create_repository("me/first", private=True)
    assert server.requests == []


def test_hub_does_not_answer(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"^push: the Hugging Face Hub does not answer: .* Connection refused$"):
        hub.create_repository("me/first", private=True)


def test_offline_mode(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"does not answer: .*unset the `HF_HUB_OFFLINE`"):
        hub.create_repository("me/first", private=True)


def test_token_is_refused(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="does not accept your token; run `hf auth login`, or set HF_TOKEN"):
        hub.create_repository("me/first", private=True)


@pytest.mark.parametrize(
    ("refuses", "kind", "complaint"),
    [
        (("validate-yaml", 400, '"license" must be one of'), UserError, ' refuses me/first: .*"license" must be'),
        (("/commit/", 403, "read-only"), UserError, "does not let you write to me/first; perhaps .*: read-only"),
        (("/commit/", 413, "too large"), UserError, " refuses me/first: too large"),
        (("/repos/create", 503, "down"), ResourceError, "out of order or overloaded: down"),
        (("/repos/create", 429, "slower"), ResourceError, "out of order or overloaded: slower"),
        (("/repos/create", 404, "no such organization"), UserError, "refuses me/first: no such organization"),
    ],
)
def test_refusals_are_one_line(server, tmp_path, refuses, kind, complaint):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    server.refuses = refuses
    with pytest.raises(UserError, match=f"^push: the Hugging Face Hub.*{complaint}") as refused:
        hub.create_repository("me/first", private=True)
        hub.upload(tmp_path, "me/first")
    assert type(refused.value) is kind
    assert len(refused.value.problems) == 1
