"""The Hugging Face Hub: downloads if it answers within seconds, otherwise its local cache."""

import logging
import os
import re
import socket
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from gpt2.errors import UserError

log = logging.getLogger(__name__)

WITHOUT_NETWORK = (
    "without a network: data=text data.files=[FILE,...]; local folders as data.dataset_name and data.tokenizer; to "
    "train, experiment=quickstart (this Python's own source) and data.tokenizer=train or bytes"
)


OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # the names of OpenAI's models


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a model on the Hub: one of OpenAI's four, or OWNER/NAME.

    A name that may be a local path is a path, except for OpenAI's: the package of this repository is a folder `gpt2`.
    """
    is_named_like_it = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    is_path = Path(name).parent.exists() or Path(name).suffix == ".pth"
    return name in OPENAI or (is_named_like_it and not is_path)


def caches() -> Path:
    """The folder for files that can be computed again, unless `data.cache_dir` names another."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2"


@cache
def connect(seconds: float = 3.0) -> None:
    """Check once whether the Hub answers. If not, make its libraries use their caches only.

    Otherwise they would retry for half a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    try:
        endpoint = urlsplit(proxy or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError) as error:  # the latter of a URL that is none
        log.info("The Hugging Face Hub does not answer (%s): using what its cache holds.", error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):  # they may be imported already
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def hub_folder(repository: str, patterns: list[str], instead: str) -> Path:
    """A local folder with the files of a model repository that match the patterns, downloaded unless cached.

    OpenAI's models may be cached with or without their owner's name, which they did not have at first.

    Args:
        instead: Advice for the error message.

    Raises:
        UserError: The repository is neither cached nor available.
    """
    connect()
    from huggingface_hub import constants, snapshot_download

    owner = "openai-community/"
    is_openai = "/" not in repository or repository.startswith(owner)
    names = [owner + repository.removeprefix(owner), repository.removeprefix(owner)] if is_openai else [repository]
    names.sort(key=lambda name: not (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir())
    reason: Exception | None = None
    for name in names:
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:  # the bases of huggingface_hub's errors
            reason = error
            continue
        if any(any(folder.glob(pattern)) for pattern in patterns):  # offline, the cached snapshot may be incomplete
            return folder
    raise UserError(
        f"{repository}: there is no such folder here, and {patterns[0]} is not to be had from the Hugging Face Hub "
        f"or its cache; {instead}"
    ) from reason
