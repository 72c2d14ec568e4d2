"""Exceptions that a user sees as one line; detection of a full disk and exhausted memory; masking of credentials."""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, EIO, EISDIR, ELOOP, ENAMETOOLONG, ENOMEM, ENOSPC, ENOTDIR, EPERM, EROFS, ESTALE
from pathlib import Path
from urllib.parse import quote, unquote

NOT_ACCESSIBLE = (EACCES, EPERM, EROFS, EIO, ESTALE, ENOTDIR, EISDIR, ELOOP, ENAMETOOLONG)


class UserError(Exception):
    """A mistake that the user can correct: printed as one line for each problem, without a traceback."""

    exit_code = 2

    def __init__(self, *problems: str):
        # A text of a user or of a library may have line breaks.
        self.problems = [r"\n".join(without_password(problem).splitlines()) for problem in problems]
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Add the problems of a UserError to a list instead of raising it."""
    try:
        yield
    except UserError as error:
        problems += error.problems


class ResourceError(UserError):
    """The disk is full, memory does not suffice, or a server does not answer."""

    exit_code = 1


class DivergenceError(UserError):
    """The loss or gradient is not finite, in too many steps to continue."""

    exit_code = 3


class LostRankError(UserError):
    """Another rank ended, so this rank cannot continue. The cause is the error of the other rank."""

    exit_code = 1


class RankTimeoutError(LostRankError):
    """Another rank did not answer in time."""


def machine_error(error: BaseException) -> str | None:
    """A full or inaccessible disk, exhausted memory or a lost job of submitit in one line; None for any other error."""
    if type(error).__name__ == "UncompletedJobError":  # an error of submitit, which may not be installed
        message = " ".join(str(error).splitlines()[:2])  # they name the job, the file of its result, and its state
        return f"{message}; what it printed is in that folder"
    if isinstance(error, OSError) and is_full_disk(error):
        return f"{error.strerror}{_where(error)}"
    if isinstance(error, OSError) and error.errno in NOT_ACCESSIBLE and isinstance(error.filename, str | os.PathLike):
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, RuntimeError) and "No space left on device" in str(error):  # PyTorch, about shared memory
        return _first_sentences(error)
    if is_out_of_memory(error):
        return f"out of memory: {_first_sentences(error)}"
    return None


def few(names: Collection[str], separator: str = ", ") -> str:
    """The first three names, shortened, and how many more there are: a damaged file may have thousands."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return separator.join(shortened(name, 700) for name in list(names)[:3]) + more


def counted(number: float, unit: str) -> str:
    """A number with its unit, such as `1 layer` or `2,000 steps`."""
    return f"{number:{',g' if isinstance(number, float) else ','}} {unit}{'s' * (number != 1)}"


def shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def one_line(error: BaseException) -> str:
    """An exception's message in one line and without passwords, or the name of its type if it has none."""
    return without_password(" ".join(str(error).split())) or type(error).__name__


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)


def _as_written(character: str) -> str:
    """A pattern for a character of a URL, which may be escaped as in JSON or in the query of another URL."""
    return rf"(?:\\?{character}|%(?:25)*{ord(character):02X})"


_COLON, _SLASH, _AT = map(_as_written, ":/@")
# A URL up to the last @ before a space, since a password may contain @, / and :. pathlib drops one of the two slashes,
# and the cache of the Hub writes `--` for each.
_IN_URL = re.compile(
    rf"(?<!\S)(?>(?P<start>\S*?(?:(?<!sqlite)(?<!journal)(?<!file){_COLON}{_SLASH}|https?{_COLON}(?:--)*"
    rf"|(?P<no_scheme>(?<![:/]){_SLASH}{_SLASH})){_SLASH}*))(?P<rest>\S+){_AT}",
    re.IGNORECASE,
)
# Credentials come before the first slash, so `host/a@b` and `host:8080/a@b` have none. A colon behind the slash belongs
# to a password that contains a slash, or to another URL.
_HOST_AND_PATH = re.compile(
    rf"(?:\[[\da-f:.]+\]|(?:(?!{_COLON}|{_SLASH}|{_AT})[^\s?#])+)(?:{_COLON}\d+)?(?:{_SLASH}|[?#])(?:(?!{_COLON})\S)*",
    re.IGNORECASE,
)
_WITHOUT_SCHEME = re.compile(  # `user:password@` before a host with a port
    rf"(?<!\S)(?>(\S*?)(?<![\w:/@.+-])[\w.+-]++{_COLON}(?=[^\s/:@'\"]))\S+{_AT}(?=\[[\da-f:]|[\w.-]+:\d)", re.IGNORECASE
)
_OF_DATABASE = re.compile(r"(postgres|mysql|mariadb|redis)[\w+]*:/+$", re.IGNORECASE)
_OFTEN_SECRET = r"(?:secret|(?<!eos_|bos_|pad_|unk_)token|\bpass|\bauth|\bsig|signature)"
_LOOKS_RANDOM = r"""(?=['"]?[a-z_.~+/=-]{0,40}\d)(?=['"]?[\w.~+/=-]{8})"""
_IS, _IN_DICT = r"(?:\s*=\s*|%(?:25)*3D)", r"['\"]\s*:\s*"
_NAMED = re.compile(
    rf"((?:passw(?:or)?d|\bpwd|passphrase|api[_-]?key|access[_-]?key)(?:{_IS}|{_IN_DICT})|{_OFTEN_SECRET}{_IN_DICT}"
    rf"|(?:[?&]|%(?:25)*(?:3F|26))[\w.-]*{_OFTEN_SECRET}{_IS}|(?:{_OFTEN_SECRET}{_IS}|\bbearer\s+){_LOOKS_RANDOM}"
    r"|\bauthorization['\"]?\s*:\s*['\"]?(?:basic|bearer)?\s+)"
    r"""('[^']*'|"[^"]*"|[^&\s'"]+)""",
    re.IGNORECASE,
)


def without_password(text: str, url: str | None = None) -> str:
    """Replace the credentials in a text by stars, also where a library has escaped or percent-encoded them.

    Credentials are: users and passwords in URLs (the user of a database remains); values of keys such as `password`;
    values of keys such as `token` in a query, or that look random; and, wherever they occur, tokens and passwords in
    environment variables and the password of `url`.
    """
    for secret in {*_secrets_of_environment(), *_passwords_of(url or "")}:
        text = text.replace(secret, "***")
    text = _IN_URL.sub(_starred, text)
    return _NAMED.sub(r"\1***", _WITHOUT_SCHEME.sub(r"\1***@", text))


def _starred(match: re.Match[str]) -> str:
    start, rest = match["start"], match["rest"]
    is_path = not re.search(_COLON, rest) if match["no_scheme"] else _HOST_AND_PATH.fullmatch(rest)
    user, colon, _ = rest.partition(":")
    is_database = _OF_DATABASE.search(start)
    if is_path or rest == "USER:PASSWORD" or (is_database and not colon):  # USER:PASSWORD stands in messages
        return match[0]
    return f"{start}{user}:***@" if is_database else f"{start}***@"


def _secrets_of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if name.upper().endswith(("TOKEN", "KEY", "PASSWORD", "SECRET")) and len(value) >= 8:
            yield value
        if "://" in value or name.upper().endswith(("_PROXY", "_ENDPOINT")):  # these may lack the scheme
            yield from (password for password in _passwords_of(value) if len(password) >= 4)


def _passwords_of(url: str) -> set[str]:
    """The password of a URL as written, with percent-encoding and without."""
    match = re.search(r"(?:://|^(?![\w+.-]+://))[^/@:\s]*:(?!\d+/)(.+)@", url)
    return {match[1], unquote(match[1]), quote(match[1], safe="")} if match else set()


def without_secrets(text: str) -> str:
    """For texts that are uploaded: replace also users of databases, and values in queries of URLs, by stars."""
    text = re.sub(r"(://)[^/@\s]*@", r"\1***@", without_password(text))
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
