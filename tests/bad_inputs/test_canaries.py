"""Secrets in the environment are in no file and no output: run folder, W&B, log, traceback or checkpoint."""

import base64

from tests.conftest import TINY, Workspace

SECRETS = {
    "WANDB_API_KEY": "c0ffee0000000000000000000000000000000001",
    "HF_TOKEN": "hf_c0ffee0000000000000000000000000002",
    "HTTPS_PROXY": "http://someone:c0ffee0003@127.0.0.1:9",
    "MY_SECRET": "c0ffee0004",
}
CANARIES = [*(value.rpartition("@")[0].rpartition(":")[2] or value for value in SECRETS.values()), "c0ffee0005"]
STORAGE = "postgresql://someone:c0ffee0005@127.0.0.1:9/studies"
ALL = "loggers=[wandb,tensorboard,mlflow,csv]"


def printed(workspace: Workspace, *command: str, code: int) -> str:
    script, *arguments = command
    process = workspace.start(script, *arguments)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == code, output[-2000:] + errors[-2000:]
    return output + errors


def test_no_secret_is_written_or_printed(workspace: Workspace):
    workspace.environment |= {**SECRETS, "WANDB_MODE": "offline"}
    tiny = [*TINY[:-4], "train.max_steps=4", "train.eval_every=2", "wandb=auto"]
    output = printed(workspace, "train.py", *tiny, "name=good", code=0)
    output += printed(workspace, "evaluate.py", "quantization=int8", code=0)
    output += printed(workspace, "generate.py", "prompt=x", "wandb=auto", code=0)
    output += printed(workspace, "-m", "gpt2.main", "export", "to=exported", code=0)
    output += printed(workspace, "train.py", "train.init_from=a/b", code=2)  # connects to the Hub through the proxy
    workspace.environment["GPT2_FAULT"] = "exception@3"
    output += printed(workspace, "train.py", *tiny, "name=crashed", ALL, code=1)
    output += printed(workspace, "train.py", "-m", *tiny, "train.seed=1,2", "name=swept", code=1)
    output += printed(
        workspace, "train.py", "-m", *tiny, "hparams_search=optuna", f"hydra.sweeper.storage='{STORAGE}'", code=2
    )
    output += printed(workspace, "-m", "gpt2.main", "compare", "outputs", "html=all.html", code=0)
    assert "Traceback" in output  # the crash has one
    files = {path: path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file()}
    assert any(b"name=good" in content for content in files.values())  # the search works
    assert any("offline-run" in str(path) for path in files)
    for canary in CANARIES:
        forms = [canary.encode(), base64.b64encode(canary.encode()).rstrip(b"="), canary.encode("utf-16-le")]
        assert not any(form in output.encode() for form in forms), canary
        assert [path for path, content in files.items() if any(form in content for form in forms)] == []
