"""Which process works on a trial, and whether it is alive.

A process writes its id and host into the trials that it claims, and a heartbeat, a time stamp, every 30 seconds. It is
dead if it is not running any more, or if it is on another machine and its last heartbeat is old.
"""

import logging
import os
import secrets
import socket
import threading
import time
from enum import Enum
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from gpt2.runtime.files import LOCK, is_locked

log = logging.getLogger(__name__)

WORKER, HEARTBEAT = "worker", "heartbeat"  # user attributes of a trial
HEARTBEAT_SECONDS = 30
DEAD_AFTER_SECONDS = 300  # without a heartbeat; allows for clocks that differ


class Status(Enum):
    ALIVE = "a process works on the trial"
    ORPHANED = "the process that trains it has lost its parent and will end soon"
    DEAD = "no process works on it"


class Worker:
    """This process as a worker of a study. Use it as a context manager, inside which it sends heartbeats."""

    def __init__(self, storage: BaseStorage):
        self.storage = storage
        self.trials: set[int] = set()  # ids of the trials that it works on
        self._is_over = threading.Event()

    def __enter__(self) -> "Worker":
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()

    def acquire(self, trial_id: int) -> str:
        """Record this worker in a trial. Returns an id of this claim: a trial may be claimed again after a crash."""
        claim = secrets.token_hex(4)
        worker = {"host": socket.gethostname(), "pid": os.getpid(), "claim": claim}
        self._send_heartbeat(trial_id)
        self.storage.set_trial_user_attr(trial_id, WORKER, worker)
        self.trials.add(trial_id)
        return claim

    def release(self, trial_id: int) -> None:
        """Give up our claim; another process may still train the trial."""
        self.trials.discard(trial_id)
        self.storage.set_trial_user_attr(trial_id, WORKER, None)

    def _send_heartbeats(self) -> None:
        while not self._is_over.wait(HEARTBEAT_SECONDS):
            for trial_id in list(self.trials):
                try:
                    self._send_heartbeat(trial_id)
                except Exception as error:  # noqa: BLE001  # the trial has ended, or the database is unreachable
                    log.debug("No heartbeat for trial id %s: %s", trial_id, error)

    def _send_heartbeat(self, trial_id: int) -> None:
        self.storage.set_trial_user_attr(trial_id, HEARTBEAT, time.time())


def status(attributes: dict[str, Any], run_folder: Path) -> Status:
    """Whether the worker of a running trial is alive.

    Args:
        attributes: User attributes of the trial.
        run_folder: Of its training, which may be a child process that outlives the worker.
    """
    worker = attributes.get(WORKER)  # None: released, or killed before `acquire`
    is_recent = time.time() - attributes.get(HEARTBEAT, 0) < DEAD_AFTER_SECONDS  # a process id may be in use again
    if worker and is_recent and (worker["host"] != socket.gethostname() or _is_running(worker["pid"])):
        return Status.ALIVE
    return Status.ORPHANED if is_locked(run_folder / LOCK) else Status.DEAD


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    try:  # Linux shows a killed process whose parent has not collected it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # another system, or the process has just ended: found at the next check
        return True
