"""Start and stop wandb non-interactively, with a timeout on every call.

wandb starts in the background, while the run trains. If the server accepts connections but never answers, the start
takes 8 seconds (3 for the login, 5 to create the run), and the end of the run takes 7 (1 for tables, 5 to finish, 1 to
end wandb's process). wandb's own timeouts bound only a part of this, so each call runs in a thread with a time limit.

Only this module uses private and unstable parts of wandb: the settings `x_*`, and the handle of its process in
`service_process`. Checked with wandb 0.31.0; `test_private_api_of_wandb` fails when they change.
"""

import logging
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import wandb

from gpt2.errors import one_line
from gpt2.tracking.loggers import limit, within

log = logging.getLogger(__name__)

LOGIN_SECONDS = 3.0  # one small request
INIT_SECONDS = 4.0  # time to create the run on the server
TABLE_SECONDS = 0.5  # time to log a table at the end of a run, which happens twice
FINISH_SECONDS = 4.0  # time to upload the rest at the end of a run
UPLOAD_SECONDS = 600.0  # the same if a checkpoint is uploaded
STAGING_SECONDS = 60.0  # time to copy a checkpoint into wandb's upload folder
GRACE_SECONDS = 1.0  # time by which wandb may exceed its own timeouts
LOCAL_SECONDS = 60.0  # time to start wandb's process, and for each offline call; only a busy machine needs so much
RETRY_SECONDS = 600.0  # time after which a server that failed is contacted again

_offline_until = 0.0  # time.monotonic() until which the runs of this process are offline


def settings(init_seconds: float, finish_seconds: float) -> wandb.Settings:
    """Settings with timeouts and without terminal output. No machine, user, command line, code or package is uploaded.

    Call this for each run: wandb stores the run's id and name in the object.
    """
    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=limit(init_seconds),
        finish_timeout=limit(finish_seconds),  # applies also when the interpreter exits
        finish_timeout_raises=True,
        x_graphql_timeout_seconds=limit(INIT_SECONDS),
        x_service_wait=limit(LOCAL_SECONDS),
        stop_fn=lambda: None,  # "stop" on the website would otherwise raise KeyboardInterrupt here
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,  # a repository's URL may contain a token
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        label_disable=True,
        program="gpt2",
        host="-",
        username="-",
        x_executable="-",
    )


def prepare() -> None:
    """Set environment variables for `start`. Call this in the main thread: changing them is not thread-safe in C."""
    os.environ.pop("WANDB_SERVICE", None)  # set by a parent process, which may end before this one
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # without a network, reports delay the exit by 20 s


def start(is_online: bool, finish_seconds: float = FINISH_SECONDS, **arguments: Any) -> Any:
    """Call `wandb.init(**arguments)`: online if requested and possible, else offline.

    Raises:
        Exception: The offline start failed as well.
    """
    wandb.setup(wandb.Settings(silent=True, x_service_wait=limit(LOCAL_SECONDS)))  # silences the login too
    if is_online and can_go_online(LOGIN_SECONDS):
        try:
            return _init("online", INIT_SECONDS, finish_seconds, arguments)
        except Exception as error:  # noqa: BLE001  # tracking never ends a run
            _stay_offline("is offline for this run", error)
    return _init("offline", LOCAL_SECONDS, LOCAL_SECONDS, arguments)


def _init(
    mode: Literal["online", "offline"], init_seconds: float, finish_seconds: float, arguments: dict[str, Any]
) -> Any:
    files, pattern = Path(arguments["dir"]) / "wandb", f"*run-*-{arguments['id']}"
    before = set(files.glob(pattern))
    init = partial(wandb.init, mode=mode, settings=settings(init_seconds, finish_seconds), **arguments)
    try:
        run = within(init_seconds + GRACE_SECONDS, init)
    except Exception:
        end_service(0)  # wandb's process still uses the id, which the next attempt needs
        for empty in set(files.glob(pattern)) - before:
            shutil.rmtree(empty, ignore_errors=True)
        raise
    os.environ.pop("WANDB_SERVICE", None)  # set by wandb; a child process may outlive this one
    return run


def can_go_online(seconds: float) -> bool:
    """Whether there is an API key that the server accepts. Never prompts."""
    if time.monotonic() < _offline_until:
        return False
    try:
        return within(seconds, lambda: wandb.login(prompt=False))
    except Exception as error:  # noqa: BLE001
        _stay_offline("is offline for this run", error)
        return False


def finish(run: Any, exit_code: int, seconds: float) -> bool:
    """Finish a run. Returns whether all of it was uploaded, or written if offline. The files are complete anyway."""
    try:
        within(seconds + GRACE_SECONDS, lambda: run.finish(exit_code=exit_code))
    except Exception as error:  # noqa: BLE001
        _stay_offline("did not finish this run", error)
        end_service(exit_code)
        return False
    return True


def mark_as_synced(folder: Path) -> None:
    """Create the file by which `wandb sync` recognizes an uploaded run folder."""
    for file in folder.glob("*.wandb"):
        file.with_name(f"{file.name}.synced").touch()


def service_process() -> Any:
    """The `Popen` of wandb's own process; None if it is not running."""
    service = getattr(getattr(wandb.setup(), "_connection", None), "_proc", None)
    return getattr(service, "_process", None)


def end_service(exit_code: int) -> None:
    """End wandb's own process, by force if necessary, so that the interpreter does not wait for it."""
    process = service_process()
    try:
        within(GRACE_SECONDS, lambda: wandb.teardown(exit_code))
    except (Exception, SystemExit):  # noqa: BLE001
        if process is not None:
            process.kill()


def _stay_offline(what: str, error: Exception) -> None:
    """Log the consequence of an error of W&B, and do not contact the server for RETRY_SECONDS."""
    global _offline_until
    log.warning("W&B %s: %s", what, one_line(error))
    _offline_until = time.monotonic() + RETRY_SECONDS
