"""The Hugging Face Hub: reached when it can be, its cache used when it cannot, and never waited for."""

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
    "what needs no network: data=text data.files=[FILE,...]; local folders as data.dataset_name and data.tokenizer; to "
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
    """Where this program keeps what it can make again, unless `data.cache_dir` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2"


@cache
def connect(seconds: float = 3.0) -> None:
    """Find out once whether the Hub answers. If not, its libraries are told to use their caches alone.

    Left to themselves they would ask six times over half a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    endpoint = urlsplit(proxy or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=seconds).close()
    except OSError as error:
        log.info("The Hugging Face Hub does not answer (%s): using what its cache holds.", error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):  # where a notebook has imported them already
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def hub_folder(repository: str, patterns: list[str], instead: str) -> Path:
    """A local folder with those files of a model repository on the Hub that match, downloaded unless cached.

    OpenAI's models are found in the cache with their owner's name and, as they were once called, without.

    Args:
        instead: What to do where it is not to be had, as the error says it.

    Raises:
        UserError: It is neither cached nor to be had.
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
        except (OSError, ValueError) as error:  # what huggingface_hub raises derives from one of the two
            reason = error
            continue
        if any(any(folder.glob(pattern)) for pattern in patterns):  # offline, what is cached may be a part
            return folder
    raise UserError(
        f"{repository}: there is no such folder here, and {patterns[0]} is not to be had from the Hugging Face Hub "
        f"or its cache; {instead}"
    ) from reason
