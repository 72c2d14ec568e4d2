"""Who works on a trial, so that what a dead process left undone is told from what another one is doing.

A process holds a lock for as long as it lives, and the trial names it. The kernel keeps the lock, so on one machine
the answer is exact, and at once. Of other machines only signs of life are known, which a trial gets from time to time.
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

WORKER, SIGN_OF_LIFE = "worker", "sign_of_life"  # user attributes of a trial
SECONDS_BETWEEN_SIGNS = 30
SECONDS_UNTIL_DEAD = 300  # without a sign; clocks of two machines may differ by some


class Life(Enum):
    ALIVE = "somebody works on it"
    ORPHANED = "the process that trains it has outlived the one that started it, and will soon notice"
    DEAD = "nobody does"


class Worker:
    """This process, as far as a study is concerned: a context in which it is alive."""

    _here: ClassVar[set[Path]] = set()  # the locks of this process, which it may not ask for itself

    def __init__(self, folder: Path, storage: BaseStorage):
        """
        Args:
            folder: Where its lock is, with those of others who share the study.
        """
        self.folder, self.storage = folder / ".workers", storage
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}{LOCK}"
        self.trials: set[int] = set()  # ids of those that it works on
        self._stack = ExitStack()
        self._is_over = threading.Event()

    def __enter__(self) -> "Worker":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(run_lock(self.folder, self.name))
        self._here.add(self.lock)
        threading.Thread(target=self._give_signs, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self._here.discard(self.lock)
        self.lock.unlink(missing_ok=True)
        self._stack.close()
        with suppress(OSError):  # others are at work, or died at it
            self.folder.rmdir()

    @property
    def lock(self) -> Path:
        return (self.folder / self.name).resolve()

    def acquire(self, trial_id: int) -> str:
        """Sign a trial. Returns what tells this time from any other that it is taken."""
        claim = secrets.token_hex(4)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "lock": str(self.lock), "claim": claim}
        self.storage.set_trial_user_attr(trial_id, WORKER, who)
        self._give_sign(trial_id)
        self.trials.add(trial_id)
        return claim

    def release(self, trial_id: int) -> None:
        """Have no more to do with a trial, which somebody else may be working on."""
        self.trials.discard(trial_id)
        self.storage.set_trial_user_attr(trial_id, WORKER, None)

    def _give_signs(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SIGNS):
            for trial_id in list(self.trials):
                try:
                    self._give_sign(trial_id)
                except Exception as error:  # noqa: BLE001  # finished by now, or the database is away for a moment
                    log.debug("No sign of life for trial id %s: %s", trial_id, error)

    def _give_sign(self, trial_id: int) -> None:
        self.storage.set_trial_user_attr(trial_id, SIGN_OF_LIFE, time.time())

    def status(self, attributes: dict[str, Any], run_folder: Path) -> "Life":
        """What has become of those who work on a trial that is said to run.

        Args:
            attributes: Of the trial.
            run_folder: Of its training, which may outlive the process that started it.
        """
        who = attributes.get(WORKER)
        lock = Path(who["lock"]) if who else None
        if lock in self._here or (lock and is_locked(lock)):
            return Life.ALIVE
        if is_locked(run_folder / LOCK):
            return Life.ORPHANED
        if not who or not lock:  # not signed when its process died, while nobody else looked; or given up
            return Life.DEAD
        is_out_of_sight = who["host"] != socket.gethostname() or not lock.exists() or is_locked(lock) is None
        is_fresh = time.time() - attributes.get(SIGN_OF_LIFE, 0) < SECONDS_UNTIL_DEAD
        return Life.ALIVE if is_out_of_sight and is_fresh else Life.DEAD
