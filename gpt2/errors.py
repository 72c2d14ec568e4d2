"""Exceptions that a user may see as one line, and what recognizes a full disk or memory among other exceptions."""

import os
import re
import shutil
from collections.abc import Collection
from errno import EDQUOT, EFBIG, ENOMEM, ENOSPC
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct: printed as one line for each problem, without a traceback."""

    exit_code = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ResourceError(UserError):
    """The disk is full, or memory does not suffice."""

    exit_code = 1


class DivergenceError(UserError):
    """The loss or gradient is not finite, too often to continue."""

    exit_code = 3


class LostRankError(UserError):
    """Another rank ended, so this one cannot continue. The error of that rank is the cause."""

    exit_code = 1


class RankTimeoutError(LostRankError):
    """Another rank did not answer in time."""


def machine_error(error: BaseException) -> str | None:
    """A full disk, exhausted memory or a lost job of submitit in one line; None for any other error."""
    if type(error).__name__ == "UncompletedJobError":  # submitit's; it may not be installed
        message = " ".join(str(error).splitlines()[:2])  # which job, the file of its result, and its state
        return f"{message}; what it printed is in that folder"
    if isinstance(error, OSError) and is_full_disk(error):
        return f"{error.strerror}{_where(error)}"
    if isinstance(error, RuntimeError) and "No space left on device" in str(error):  # PyTorch's, about shared memory
        return _first_sentences(error)
    if is_out_of_memory(error):
        return f"out of memory: {_first_sentences(error)}"
    return None


def few(names: Collection[str], separator: str = ", ") -> str:
    """The first three of some names, and how many more there are: a damaged file may have thousands."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return separator.join(list(names)[:3]) + more


def one_line(error: BaseException) -> str:
    """An exception's message in one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)


def without_password(text: str, url: str | None = None) -> str:
    """A text with the passwords of URLs replaced by stars, and every occurrence of the password of `url`."""
    password = re.search(r"://[^/@:]*:(.+)@", url or "")
    if password and password[1]:
        text = text.replace(password[1], "***")
    text = re.sub(r"(://[^/@:\s]*:)[^\s]*@", r"\1***@", text)
    return re.sub(r"([?&]password=)[^&\s'\"]+", r"\1***", text)


def without_secrets(text: str) -> str:
    """A text with the parts of URLs that may be secret replaced by stars: user, password, values of the query."""
    text = re.sub(r"(://)[^/@\s]*@", r"\1***@", text)
    return re.sub(r"([?&][\w.-]+=)[^&\s'\"]+", r"\1***", text)


def _where(error: OSError) -> str:
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    folder = next((path for path in Path(error.filename).absolute().parents if path.exists()), Path("/"))
    return f": {error.filename} ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of the host is exhausted. Works without importing torch."""
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_allocation = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_allocation


def _first_sentences(error: BaseException) -> str:
    """The first two sentences of a message: the size of the allocation, without PyTorch's advice."""
    text = " ".join(str(error).split())
    return ". ".join(text.split(". ")[:2]).removesuffix(".") or type(error).__name__
