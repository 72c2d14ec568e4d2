"""W&B's own process, on a short leash: it asks nobody, and all that it takes together has an end.

At worst, with a server that takes connections and says nothing, a run loses 15 seconds: 3 for the login, 5 to begin, 1
for a last table, 5 to end, 1 to be rid of the process. `finish_timeout` bounds what uploads; a thread bounds what wandb
(0.31) does not.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import wandb

log = logging.getLogger(__name__)
T = TypeVar("T")

LOGIN_SECONDS = 3.0  # for one small question to the server
INIT_SECONDS = 4.0  # to begin the run there
FINISH_SECONDS = 4.0  # to upload what is left
UPLOAD_SECONDS = 600.0  # the same with checkpoints, which somebody asked for
STAGING_SECONDS = 60.0  # to copy a checkpoint to where it is uploaded from
GRACE_SECONDS = 1.0  # for wandb to keep to these
RETRY_SECONDS = 600.0

_offline_until = 0.0  # a server that failed is not asked again by the next runs of this process


def settings(finish_seconds: float) -> wandb.Settings:
    """Bounded, silent, and without the machine's and the user's names, command line, terminal, code and packages.

    To be made anew for each run: wandb writes the run's id and name into it.
    """
    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_SECONDS,
        finish_timeout=finish_seconds,  # also of what wandb does when the interpreter ends
        finish_timeout_raises=True,
        x_graphql_timeout_seconds=INIT_SECONDS,
        x_service_wait=INIT_SECONDS,
        stop_fn=lambda: None,  # a click on "stop" there would be a Ctrl-C here
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,  # the URL of a repository may hold a token
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        label_disable=True,
        program="gpt2",
        host="-",
        username="-",
        x_executable="-",
    )


def start(is_online: bool, finish_seconds: float = FINISH_SECONDS, **how: Any) -> Any:
    """`wandb.init(**how)`: online if that is wanted and a server answers, else offline; None if that fails too."""
    os.environ.pop("WANDB_SERVICE", None)  # of a parent: it may end before us, or have ended
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its makers' telemetry holds the exit up for 20 seconds
    try:
        wandb.setup(wandb.Settings(silent=True, x_service_wait=INIT_SECONDS))  # silent about the login too
    except Exception as error:  # noqa: BLE001  # a guest cannot stop the run, whatever goes wrong with it
        log.warning("W&B did not start: %s", _line(error))
        return None
    kept, own = Path(how["dir"]) / "wandb", f"*run-*-{how['id']}"
    for mode in ("online", "offline") if is_online and can_go_online() else ("offline",):
        before = set(kept.glob(own))
        begin = partial(wandb.init, mode=mode, settings=settings(finish_seconds), **how)
        try:
            run = within(INIT_SECONDS + GRACE_SECONDS, begin)
        except Exception as error:  # noqa: BLE001
            log.warning("W&B (%s) did not start: %s", mode, _line(error))
            _stay_offline()
            end_service(0)  # it still holds the id that the next attempt takes
            for empty in set(kept.glob(own)) - before:
                shutil.rmtree(empty, ignore_errors=True)
        except BaseException:  # asked to end meanwhile; wandb would say later that all went well
            end_service(1)
            raise
        else:
            os.environ.pop("WANDB_SERVICE", None)  # ours: a process that we start may go on after us
            return run
    return None


def can_go_online() -> bool:
    """Whether there is a key and a server that takes it. Nobody is asked."""
    if time.monotonic() < _offline_until:
        return False
    try:
        return within(LOGIN_SECONDS, lambda: wandb.login(prompt=False))
    except Exception as error:  # noqa: BLE001  # no answer, no such key
        log.warning("W&B: this run is kept offline: %s", _line(error))
        _stay_offline()
        return False


def finish(run: Any, exit_code: int, seconds: float = FINISH_SECONDS) -> bool:
    """End W&B's run. False if the upload was cut short; the files of the run hold everything."""
    try:
        within(seconds + GRACE_SECONDS, lambda: run.finish(exit_code=exit_code))
    except Exception as error:  # noqa: BLE001
        log.warning("W&B did not take all of this run: %s", _line(error))
        _stay_offline()
        end_service(exit_code)
        return False
    except BaseException:  # asked to end meanwhile; wandb would add that all went well when the interpreter ends
        end_service(exit_code)
        raise
    return True


def end_service(exit_code: int) -> None:
    """End wandb's own process, kindly or else by force, so that the interpreter does not wait for it."""
    service = getattr(getattr(wandb.setup(), "_connection", None), "_proc", None)
    process = getattr(service, "_process", None)
    try:
        within(GRACE_SECONDS, lambda: wandb.teardown(exit_code))
    except (Exception, SystemExit):  # noqa: BLE001
        if process is not None:
            process.kill()


def within(seconds: float, do: Callable[[], T]) -> T:
    """What `do` returns or raises.

    Raises:
        TimeoutError: It takes longer. It goes on, in a thread that nobody waits for.
    """
    outcome: list[Callable[[], T]] = []

    def work() -> None:
        try:
            result = do()
        except BaseException as raised:  # noqa: BLE001
            error = raised

            def fail() -> T:
                raise error

            outcome.append(fail)
        else:
            outcome.append(lambda: result)

    thread = threading.Thread(target=work, daemon=True, name="wandb")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]()


def _stay_offline() -> None:
    global _offline_until
    _offline_until = time.monotonic() + RETRY_SECONDS


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
