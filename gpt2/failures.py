"""What stops a run and is no bug: the machine has no room or no memory, the numbers diverge. Each in a line.

The line says what happened, what would help, and how to go on from what is saved.
"""

import os
import re
import shutil
from errno import EDQUOT, EFBIG, ENOMEM, ENOSPC
from pathlib import Path

from gpt2.config import Divergence, MachineError, TrainRun, UserError
from gpt2.run_folder import folder_of_run, newest_first, step_of


def machine_error(error: BaseException) -> str | None:
    """A full disk or memory in a line, or a job that was lost; None for any other error."""
    if type(error).__name__ == "UncompletedJobError":  # submitit's, by its name: it may not be installed
        return _lost_job(str(error))
    if isinstance(error, OSError) and is_full_disk(error):
        return f"{error.strerror}{_where(error)}"
    if isinstance(error, RuntimeError) and "No space left on device" in str(error):  # of PyTorch, about shared memory
        return _first_sentences(error)
    if is_out_of_memory(error):
        return f"out of memory: {_first_sentences(error)}"
    return None


def _lost_job(told: str) -> str:
    job, file, state = (re.search(pattern, told) for pattern in (r"Job (\S+)", r"with path (.*)", r"\(state: (\w+)\)"))
    where = f", what it printed is in {Path(file[1]).parent}" if file else ""
    return f"job {job[1] if job else '?'} ended without a result ({state[1] if state else '?'}){where}; others go on"


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG)


def without_password(text: str, url: str | None = None) -> str:
    """A text with the password of a URL starred out, wherever it stands; that of `url` by itself too."""
    password = re.search(r"://[^/@:]*:(.+)@", url or "")
    if password and password[1]:
        text = text.replace(password[1], "***")
    text = re.sub(r"(://[^/@:\s]*:)[^\s]*@", r"\1***@", text)
    return re.sub(r"([?&]password=)[^&\s'\"]+", r"\1***", text)


def without_secrets(text: str) -> str:
    """A text with all of its URLs that may be one starred out: user, password, token, the values of the query."""
    text = re.sub(r"(://)[^/@\s]*@", r"\1***@", text)
    return re.sub(r"([?&][\w.-]+=)[^&\s'\"]+", r"\1***", text)


def _where(error: OSError) -> str:
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    folder = next((path for path in Path(error.filename).absolute().parents if path.exists()), Path("/"))
    return f": {error.filename} ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there)"


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host; told by its name, for torch may not be loaded."""
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_allocation = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_allocation


def _first_sentences(error: BaseException) -> str:
    """What was asked for, without PyTorch's advice for programmers."""
    text = " ".join(str(error).split())
    return ". ".join(text.split(". ")[:2]).removesuffix(".") or type(error).__name__


def explain(error: Exception, config: TrainRun, run: Path, command: str) -> UserError | None:
    """What ended the training of a run, and how to go on; None for a bug.

    Args:
        run: Its folder.
        command: What goes on with it, as typed.
    """
    train, problem = config.train, machine_error(error)
    if isinstance(error, Divergence):
        slower = f"train.learning_rate={train.learning_rate / 2:g} resume_changes=true"
        return Divergence(f"{error}{saved(run, f'{command} {slower}')}")
    if problem is None:
        return None
    if not is_out_of_memory(error):
        return MachineError(f"{problem}; make room{saved(run, command)}")
    smaller, also = "train.gradient_checkpointing=true", ""
    if train.batch_size == 1 and train.gradient_checkpointing:
        return MachineError(
            f"{problem}, with the smallest passes there are; a smaller model or data.max_length would do"
        )
    if train.batch_size > 1:
        parts = next(n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0)
        batch_size, passes = train.batch_size // parts, train.accumulation_steps * parts
        also = "" if train.gradient_checkpointing else f", and so does {smaller}"
        smaller = f"train.batch_size={batch_size} train.accumulation_steps={passes}"
    return MachineError(
        f"{problem}. A pass was train.batch_size={train.batch_size} blocks of data.max_length={config.data.max_length} "
        f"tokens, a step train.accumulation_steps={train.accumulation_steps} of them; {smaller} makes the same steps "
        f"in less memory{also}{saved(run, f'{command} {smaller} resume_changes=true')}"
    )


def saved(run: Path, command: str) -> str:
    """What is saved of a run, and the command that goes on with it, as the end of a sentence."""
    folder = folder_of_run(run)
    steps = [step for path in newest_first(folder) if (step := step_of(path)) is not None] if folder else []
    return f". Step {steps[0]:,} is saved, go on with: {command}" if steps else ""
