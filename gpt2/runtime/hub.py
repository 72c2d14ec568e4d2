"""The Hugging Face Hub: downloads, or the local cache if the Hub does not answer within seconds; uploads."""

import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from gpt2.errors import ResourceError, UserError, one_line

log = logging.getLogger(__name__)

WITHOUT_NETWORK = (
    "without a network: data=text data.files=[FILE,...]; local folders as data.dataset_name and data.tokenizer; to "
    "train, experiment=quickstart (this Python's own source) and data.tokenizer=train or bytes"
)

# Environment variables that hold the URL of a server.
ADDRESSES = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy")

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names of OpenAI's models


def is_on_hub(name: str) -> bool:
    """Whether a name denotes a model on the Hub: one of OpenAI's four, or OWNER/NAME.

    A name that could be a local path counts as a path, except OpenAI's names: this repository has a folder `gpt2`.
    """
    is_owner_and_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    is_path = Path(name).parent.exists() or Path(name).suffix == ".pth"
    return name in OPENAI or (is_owner_and_name and not is_path)


def caches() -> Path:
    """The default of `data.cache_dir`, for files that can be computed again.

    It is a temporary folder if the home directory is not writable.
    """
    return _writable_cache(_home() / "gpt2")


def _home() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home directory
        return Path("/nonexistent")


def move_hub_cache() -> None:
    """Give the Hugging Face libraries a temporary cache if theirs cannot be created. Call it before importing them."""
    folder = Path(os.environ.get("HF_HOME") or _home() / "huggingface")
    if not os.path.lexists(folder) and (instead := _writable_cache(folder)) != folder:
        os.environ["HF_HOME"] = str(instead)


@cache
def _writable_cache(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        instead = Path(tempfile.gettempdir(), f"gpt2-cache-{os.getuid()}")
        with suppress(FileExistsError):
            instead.mkdir(mode=0o700)
        if instead.lstat().st_uid != os.getuid() or not instead.is_dir():  # another user could change its files
            instead = Path(tempfile.mkdtemp(prefix="gpt2-cache-"))
        log.warning("The cache %s cannot be written to (%s): %s is used instead.", folder, error.strerror, instead)
        return instead


@cache
def connect(seconds: float = 3.0) -> None:
    """Check once whether the Hub answers. If not, make its libraries use only their caches.

    Without this, the libraries retry for half a minute.

    Raises:
        UserError: An environment variable does not hold a valid URL; the libraries' own error would not name it.
    """
    address = _address_of_hub()
    move_hub_cache()
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        socket.create_connection(address, timeout=seconds).close()
    except OSError as error:
        log.info("The Hugging Face Hub does not answer (%s): using what its cache holds.", error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("huggingface_hub.constants", "datasets.config"):  # if they are imported already
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _address_of_hub() -> tuple[str, int]:
    """Host and port of the Hub, or of the proxy to it."""
    addresses = {name: _address(name) for name in ADDRESSES if os.environ.get(name)}
    names = ("HTTPS_PROXY", "https_proxy", "HF_ENDPOINT")
    return next((addresses[name] for name in names if name in addresses), ("huggingface.co", 443))


def _address(name: str) -> tuple[str, int]:
    """Host and port of the URL in an environment variable."""
    value = os.environ[name]
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    except ValueError:  # the message may contain a part of the password
        hint = "in a password, /, @ and : are written %2F, %40 and %3A"
        raise UserError(f"{name}: not the URL of a server, such as http://USER:PASSWORD@HOST:3128; {hint}") from None


def hub_folder(repository: str, patterns: list[str], instead: str) -> Path:
    """Return a local folder with the files of a model repository that match the patterns, downloaded unless cached.

    OpenAI's models may be cached under names without an owner, which the Hub added later.

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
        except (OSError, ValueError) as error:  # the base classes of the errors of huggingface_hub
            reason = error
            continue
        if any(any(folder.glob(pattern)) for pattern in patterns):  # offline, the cached snapshot may be incomplete
            return folder
    raise UserError(
        f"{repository}: there is no such folder here, and neither the Hugging Face Hub nor its cache provides "
        f"{patterns[0]}; {instead}"
    ) from reason


def create_repository(name: str, private: bool) -> None:
    """Create a model's repository on the Hub, unless it exists. Call this before exporting the files to upload.

    Raises:
        UserError: No account is logged in, or the account may not create or write the repository.
        ResourceError: The Hub does not answer.
    """
    move_hub_cache()
    from huggingface_hub import create_repo, get_token

    if get_token() is None:
        raise UserError("push: not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    with _refusals_as_lines(name):
        socket.create_connection(_address_of_hub(), timeout=3).close()  # create_repo has no time limit
        create_repo(name, private=private, exist_ok=True)


def upload(folder: Path, name: str) -> str:
    """Upload all files of a folder in one commit. Returns its URL.

    Raises:
        UserError: See `create_repository`; or the Hub refuses the model card.
    """
    from huggingface_hub import upload_folder
    from huggingface_hub.utils import disable_progress_bars

    from gpt2.runtime.console import is_terminal

    if not is_terminal():
        disable_progress_bars()
    with _refusals_as_lines(name):
        return upload_folder(repo_id=name, folder_path=folder, commit_message="Export").commit_url


@contextmanager
def _refusals_as_lines(name: str) -> Iterator[None]:
    """Turn errors of the Hub into one-line errors."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = " ".join((error.server_message or f"it answers {status}").split())
        if status >= 500 or status == 429:
            raise ResourceError(f"push: the Hugging Face Hub is out of order or overloaded: {reason}") from error
        what = {
            401: "does not accept your token; run `hf auth login`, or set HF_TOKEN",
            403: f"does not let you write to {name}; perhaps your token can only read",
        }.get(status, f"refuses {name}")
        raise UserError(f"push: the Hugging Face Hub {what}: {reason}") from error
    except ValueError as error:  # an invalid model card
        raise UserError(f"push: the Hugging Face Hub refuses {name}: {one_line(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise ResourceError(f"push: the Hugging Face Hub does not answer: {one_line(error)}") from error
