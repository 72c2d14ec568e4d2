"""Which process works on a trial, and whether it is alive.

Each process holds a file lock as long as it lives, and the trials that it claimed name this lock. On one machine the
kernel knows the answer exactly and at once. A process on another machine counts as dead when its heartbeat, a time
stamp in the trial, is old.
"""

import logging
import os
import secrets
import socket
import threading
import time
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from optuna.storages import BaseStorage

from gpt2.runtime.files import LOCK, is_locked, run_lock

log = logging.getLogger(__name__)

WORKER, HEARTBEAT = "worker", "heartbeat"  # user attributes of a trial
HEARTBEAT_SECONDS = 30
DEAD_AFTER_SECONDS = 300  # without a heartbeat; allows for clocks that differ


class Status(Enum):
    ALIVE = "a process works on the trial"
    ORPHANED = "the process that trains it has lost its parent and will end soon"
    DEAD = "no process works on it"


class Worker:
    """This process as a worker of a study. Use it as a context manager: inside, it counts as alive."""

    _own_locks: ClassVar[set[Path]] = set()  # of this process; testing such a lock would release it

    def __init__(self, folder: Path, storage: BaseStorage):
        """
        Args:
            folder: The study's; the locks of its workers are files in it.
        """
        self.folder, self.storage = folder / ".workers", storage
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}{LOCK}"
        self.trials: set[int] = set()  # ids of the trials that it works on
        self._stack = ExitStack()
        self._is_over = threading.Event()

    def __enter__(self) -> "Worker":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(run_lock(self.folder, self.name))
        self._own_locks.add(self.lock)
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self._own_locks.discard(self.lock)
        self.lock.unlink(missing_ok=True)
        self._stack.close()
        with suppress(OSError):  # not empty: other workers are alive, or were killed
            self.folder.rmdir()

    @property
    def lock(self) -> Path:
        return (self.folder / self.name).resolve()

    def acquire(self, trial_id: int) -> str:
        """Record this worker in a trial. Returns an id of this claim: a trial may be claimed again after a crash."""
        claim = secrets.token_hex(4)
        worker = {"host": socket.gethostname(), "pid": os.getpid(), "lock": str(self.lock), "claim": claim}
        self.storage.set_trial_user_attr(trial_id, WORKER, worker)
        self._send_heartbeat(trial_id)
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

    def status(self, attributes: dict[str, Any], run_folder: Path) -> Status:
        """Whether the worker of a running trial is alive.

        Args:
            attributes: User attributes of the trial.
            run_folder: Of its training, which may be a child process that outlives the worker.
        """
        worker = attributes.get(WORKER)
        lock = Path(worker["lock"]) if worker else None
        if lock in self._own_locks or (lock and is_locked(lock)):
            return Status.ALIVE
        if is_locked(run_folder / LOCK):
            return Status.ORPHANED
        if not worker or not lock:  # released, or killed before `acquire`
            return Status.DEAD
        is_elsewhere = worker["host"] != socket.gethostname() or not lock.exists() or is_locked(lock) is None
        is_recent = time.time() - attributes.get(HEARTBEAT, 0) < DEAD_AFTER_SECONDS
        return Status.ALIVE if is_elsewhere and is_recent else Status.DEAD
