"""Which process works on a trial, and whether that process is alive.

A process writes its id and host into each trial that it claims, and every 30 seconds a heartbeat (a time stamp). It
counts as dead if its last heartbeat is old, or if it ran on this machine and no process here has its id.
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
DEAD_AFTER_SECONDS = 300  # age of the last heartbeat; allows for machines whose clocks differ


class Status(Enum):
    ALIVE = "a process works on the trial"
    ORPHANED = "its worker is dead; a child process still trains it and will end soon"
    DEAD = "no process works on the trial"


class Worker:
    """This process as a worker of a study. Its context sends heartbeats for the trials that it works on."""

    def __init__(self, storage: BaseStorage):
        self.storage = storage
        self.trials: set[int] = set()  # Optuna's ids of the trials that this process works on
        self._is_over = threading.Event()

    def __enter__(self) -> "Worker":
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()

    def acquire(self, trial_id: int) -> str:
        """Record this worker in a trial. Return the id of this claim: after a crash, the trial gets another claim."""
        claim = secrets.token_hex(4)
        worker = {"host": socket.gethostname(), "pid": os.getpid(), "claim": claim}
        self._send_heartbeat(trial_id)
        self.storage.set_trial_user_attr(trial_id, WORKER, worker)
        self.trials.add(trial_id)
        return claim

    def release(self, trial_id: int) -> None:
        """Remove this worker from a trial."""
        self.trials.discard(trial_id)
        self.storage.set_trial_user_attr(trial_id, WORKER, None)

    def _send_heartbeats(self) -> None:
        while not self._is_over.wait(HEARTBEAT_SECONDS):
            for trial_id in list(self.trials):
                try:
                    self._send_heartbeat(trial_id)
                except Exception as error:  # noqa: BLE001  # the trial has ended, or the storage is unreachable
                    log.debug("No heartbeat for trial id %s: %s", trial_id, error)

    def _send_heartbeat(self, trial_id: int) -> None:
        self.storage.set_trial_user_attr(trial_id, HEARTBEAT, time.time())


def status(attributes: dict[str, Any], run_folder: Path) -> Status:
    """Return whether a process works on a trial in the state RUNNING.

    Args:
        attributes: User attributes of the trial.
        run_folder: Locked by the process that trains. This may be a child process that outlives the worker.
    """
    worker = attributes.get(WORKER)  # None: released, or the process was killed before `acquire`
    is_recent = time.time() - attributes.get(HEARTBEAT, 0) < DEAD_AFTER_SECONDS  # a later process may have the same id
    if worker and is_recent and (worker["host"] != socket.gethostname() or _is_running(worker["pid"])):
        return Status.ALIVE
    return Status.ORPHANED if is_locked(run_folder / LOCK) else Status.DEAD


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    try:  # a killed process remains a zombie until its parent collects it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # not Linux, or the process has just ended: the next check finds it dead
        return True
