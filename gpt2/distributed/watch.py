"""Ranks watch each other, so that one that fails, dies or hangs ends them all, and the cause is told.

Left to torch.distributed, the others would wait in a collective operation until its timeout. That must be longer than
anything that rank 0 does alone, such as writing a large checkpoint, and the error after it names no cause. Here every
rank leaves a sign of life each second in the store by which torchrun has brought them together. It says how far the
rank is, so slow is told from stuck. Rank 0 reads them all; the others watch rank 0.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from gpt2.errors import ResourceError, UserError, without_password
from gpt2.runtime.signals import Interrupted, end_undisturbed

BEAT = 1.0  # seconds between signs of life
# Shares of `distributed.timeout`; what is left is for the processes to end.
SILENT_AFTER, STUCK_AFTER = 1 / 3, 3 / 4
GONE_AFTER = 4.0  # seconds without a sign of life, once a connection has broken
SECONDS_TO_END = 5.0  # for the main thread of the rank that tells the cause; then the process ends under it

FAILURE, BROKEN = "failure", "broken"  # keys of the store: what ends all; a connection broke, so somebody is gone
LEFT = b"left"  # stands there instead of a sign of life


@dataclass
class Failure:
    """What ends all ranks."""

    text: str
    speaker: int = 0  # the rank that tells it
    exit_code: int = 1
    says_how_to_go_on: bool = False


@dataclass
class Sign:
    """A sign of life."""

    number: int
    marks: int
    watched: bool
    place: str
    line: str
    host: str
    process: int


class EndedByAnother(SystemExit):
    """This rank ends because another one failed, and the cause is told elsewhere."""


class Watch:
    """One rank's part in it: a context, to be entered by all ranks, which hears of the errors that leave it."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        """
        Args:
            store: Which all ranks share.
            timeout: Seconds within which all ranks end, once one of them fails, dies or hangs.
        """
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.how_to_go_on: Callable[[], str] = str  # what follows the cause
        self.last_words: Callable[[UserError], Any] = lambda _: None  # should the process end under its main thread
        self._main_thread = threading.get_ident()
        self._numbers = self._marks = 0
        self._place, self._watched = "the start", False
        self._told: ResourceError | None = None  # what another rank's failure has become here
        self._has_said = False  # the main thread is on its way out
        self._looked = time.monotonic()  # when the store answered last
        self._left = threading.Event()  # the main thread has
        self._signs: dict[int, Sign | None] = {}  # the newest of each rank; None: it has left
        self._since: dict[int, float] = {}  # when it came
        self._silent: list[int] = []  # the ranks without one
        self._progress = time.monotonic()  # when any rank last made some

    # What the main thread says

    def mark(self, place: str) -> None:
        """Something has been done. Now comes `place`."""
        self._marks += 1
        self._place = place

    @contextmanager
    def watched(self, watched: bool = True) -> Iterator[None]:
        """Within it, a rank that goes on without `mark` counts as stuck; or, if not `watched`, is left in peace.

        Raises:
            MachineError: The connection to another rank broke, for this reason, and it is this rank's part to tell.
            EndedByAnother: And it is not.
        """
        before, self._watched = self._watched, watched
        try:
            yield
        except Exception as error:
            if _is_of_connection(error):
                self._leave_because_of(self._find_cause(error), error)
            if self.rank == 0:  # which has much to do before it ends, and says what has happened itself
                self._settle(error)
            raise
        finally:
            self._watched = before

    def barrier(self, place: str) -> None:
        """Wait for all ranks to come to a place, however long it takes them; all of them live, or this ends."""
        if self.store.add(f"met/{place}", 1) == self.world_size:
            self.store.set(f"all/{place}", "")
        self.wait_for(f"all/{place}")

    def wait_for(self, key: str) -> None:
        """Wait until a rank has set a key of the store; those that are waited for live, or this ends."""
        while not self.store.check([key]):
            if self.store.check([FAILURE]):
                raise EndedByAnother(1)
            if ended := [str(rank) for rank, sign in self._signs.items() if sign is None and rank != self.rank]:
                _agree_on(self.store, Failure(f"rank {', '.join(ended)} has ended before the others", self.rank))
            time.sleep(0.05)

    def __enter__(self) -> "Watch":
        self._give_sign(self.store)
        self.barrier("the start")  # from here on there is a sign of each
        self._looked = time.monotonic()
        for task in (self._watch, self._watch_store):
            threading.Thread(target=task, daemon=True).start()
        return self

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        self._left.set()
        if error is not None:
            end_undisturbed()
        try:
            if error is not None and not isinstance(error, Interrupted | EndedByAnother):
                self._settle(error)
            elif error is not None and (failure := self._heard(self.store)):
                self._leave_because_of(failure, error)
        finally:
            with suppress(RuntimeError):  # the store is gone, and with it whoever could want to know
                self.store.set(f"sign/{self.rank}", LEFT.decode())
                self._leave_last()

    def _leave_last(self) -> None:
        """Wait a little for the others where rank 0 itself holds the store, for it is not torchrun that started it."""
        if self.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        until, signs = time.monotonic() + SECONDS_TO_END, [f"sign/{rank}" for rank in range(self.world_size)]
        while time.monotonic() < until and any(sign != LEFT for sign in self.store.multi_get(signs)):
            time.sleep(0.05)

    def _settle(self, error: BaseException) -> None:
        """Find out whether an error is this rank's own, which the others are told, or comes from another's."""
        if error is self._told:
            return
        self._has_said = True
        if isinstance(error, UserError):
            failure = self._publish(str(error), error.exit_code, explained=True)
            if self.rank != failure.speaker:
                raise EndedByAnother(failure.exit_code) from error
        elif _is_of_connection(error):
            self._leave_because_of(self._find_cause(error), error)
        else:
            self._publish(f"{type(error).__name__}: {error}", 1, explained=False)

    def _leave_because_of(self, failure: Failure, error: BaseException) -> None:
        end_undisturbed()
        self._has_said = True
        # What is left is to say it, but an interpreter may hang at its end, where a GPU waits for one that is gone.
        at_last = threading.Timer(2 * SECONDS_TO_END, os._exit, [failure.exit_code])
        at_last.daemon = True
        at_last.start()
        _leave_note_for_torchrun(failure)
        if self.rank != failure.speaker:
            raise EndedByAnother(failure.exit_code) from error
        self._told = ResourceError(self._in_full(failure))
        self._told.exit_code = failure.exit_code
        raise self._told from error

    def _in_full(self, failure: Failure) -> str:
        return failure.text if failure.says_how_to_go_on else f"{failure.text}{self.how_to_go_on()}"

    # What ends the ranks

    def _publish(self, text: str, exit_code: int, explained: bool) -> Failure:
        """Tell the others what has gone wrong here."""
        failure = Failure(f"rank {self.rank}: {without_password(text)}", 0, exit_code, explained)
        _leave_note_for_torchrun(failure)
        return _agree_on(self.store, failure)

    def _heard(self, store: dist.Store) -> Failure | None:
        return Failure(**json.loads(store.get(FAILURE))) if store.check([FAILURE]) else None

    def _find_cause(self, error: BaseException) -> Failure:
        """Why the connection to another rank broke: that one tells, or is found to be gone."""
        end_undisturbed()  # torchrun is about to ask
        self._watched = False
        until = time.monotonic() + self._long() + GONE_AFTER
        try:
            self.store.set(BROKEN, "")
            while time.monotonic() < until:
                if failure := self._heard(self.store) or self._judge(self.store, GONE_AFTER):
                    return _agree_on(self.store, failure)
                time.sleep(0.1)
            ended = [str(rank) for rank, sign in self._signs.items() if sign is None]
            why = f"rank {', '.join(ended)} has ended" if ended else " ".join(str(error).split())
            return _agree_on(self.store, Failure(f"rank {self.rank} lost the connection to others: {why}", self.rank))
        except RuntimeError:
            return self._without_store()

    def _long(self) -> float:
        """Seconds without a sign of life after which a rank is given up."""
        return SILENT_AFTER * self.timeout

    def _without_store(self) -> Failure:
        return Failure("what started this run, and holds its ranks together, is gone or cut off", self.rank)

    def _watch(self) -> None:
        store = self.store.clone()  # type: ignore[attr-defined]  # one for each thread
        failure = None
        try:
            while failure is None and not self._left.wait(BEAT):
                self._give_sign(store)
                is_broken = store.check([BROKEN])
                failure = self._heard(store) or self._judge(store, GONE_AFTER if is_broken else self._long())
            if failure is None:
                return
            failure = _agree_on(store, failure)
            if not is_broken:  # one that is only stopped breaks no connection
                for sign in filter(None, map(self._signs.get, self._silent)):
                    _kill(sign)
        except RuntimeError:
            failure = self._without_store()
        if not self._left.wait(SECONDS_TO_END if self.rank == failure.speaker else 0):
            self._end(failure)

    def _watch_store(self) -> None:
        """End this rank if the store no longer answers: its machine is cut off, and whoever asks it waits for ever."""
        limit, before = self._long(), time.monotonic()
        earliest = before + limit
        while not self._left.wait(BEAT):
            now = time.monotonic()
            if now - before > 3 * BEAT:  # this process stood still
                earliest = now + limit
            before = now
            if now > max(earliest, self._looked + limit):
                self._end(self._without_store())

    def _end(self, failure: Failure) -> None:
        """End the process, whatever its main thread waits for."""
        if self._has_said and self._left.wait(2 * SECONDS_TO_END):
            return
        _leave_note_for_torchrun(failure)
        if self.rank == failure.speaker:
            told = self._in_full(failure)
            if not self._has_said:
                last = threading.Thread(target=self.last_words, args=(ResourceError(told),), daemon=True)
                last.start()
                last.join(SECONDS_TO_END)
            print(f"error: {told}", file=sys.stderr, flush=True)
        os._exit(failure.exit_code)

    # Signs of life

    def _give_sign(self, store: dist.Store) -> None:
        self._numbers += 1
        line = _line_of(self._main_thread)
        where = line, os.uname().nodename, os.getpid()
        sign = Sign(self._numbers, self._marks, self._watched, self._place, *where)
        store.set(f"sign/{self.rank}", json.dumps(astuple(sign)))

    def _look(self, store: dist.Store) -> None:
        """Read the signs of the ranks that this one looks after."""
        group = range(self.world_size) if self.rank == 0 else [0]
        texts = store.multi_get([f"sign/{rank}" for rank in group])
        now = time.monotonic()
        if (pause := now - self._looked) > 3 * BEAT:  # it may have been this process that stood still, or the store
            self._progress += pause
            self._since = {rank: since + pause for rank, since in self._since.items()}
        self._looked = now
        for rank, text in zip(group, texts, strict=True):
            before, sign = self._signs.get(rank), None if text == LEFT else Sign(*json.loads(text))
            if rank not in self._signs or sign != before:
                self._signs[rank], self._since[rank] = sign, now
                if sign is None or before is None or not sign.watched or sign.marks != before.marks:
                    self._progress = now

    def _judge(self, store: dist.Store, silent_after: float) -> Failure | None:
        """What is wrong with the ranks that this one looks after."""
        self._look(store)
        now, alive = time.monotonic(), {rank: sign for rank, sign in self._signs.items() if sign}
        self._silent = silent = [rank for rank in alive if now - self._since[rank] > silent_after]
        if silent:
            names = ", ".join(f"rank {rank} (process {alive[rank].process} on {alive[rank].host})" for rank in silent)
            return Failure(
                f"no sign of life of {names}: killed or stopped, or the machine is cut off",
                speaker=self.rank if 0 in silent else 0,
            )
        if self.rank == 0 and now - self._progress > STUCK_AFTER * self.timeout:
            places = "; ".join(f"rank {rank} in {sign.place}, {sign.line}" for rank, sign in alive.items())
            seconds = now - self._progress
            return Failure(
                f"stuck: no rank has come further for {seconds:.0f} s ({places}); if a pass may take that long, "
                f"distributed.timeout={2 * self.timeout:g} allows for it"
            )
        return None


def _agree_on(store: dist.Store, failure: Failure) -> Failure:
    """The first that is found is the cause, for all."""
    return Failure(**json.loads(store.compare_set(FAILURE, "", json.dumps(asdict(failure)))))


def _kill(silent: Sign) -> None:
    """End a process of this machine that may only be stopped, and then could not end when it is asked to."""
    with suppress(OSError):
        parent = Path(f"/proc/{silent.process}/stat").read_text().rpartition(")")[2].split()[1]
        if silent.host == os.uname().nodename and int(parent) == os.getppid():  # torchrun has started both
            os.kill(silent.process, signal.SIGKILL)


def _line_of(thread: int) -> str:
    """Where in the code a thread is."""
    frame = sys._current_frames().get(thread)
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""


def _is_of_connection(error: BaseException) -> bool:
    """Whether that is what torch.distributed raises when another rank is lost."""
    signs = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
    is_told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return is_told or isinstance(error, dist.DistError)


def _leave_note_for_torchrun(failure: Failure) -> None:
    """Have torchrun's report, which comes last, say it too."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        try:
            raise ResourceError(failure.text) from None
        except ResourceError as told:
            get_error_handler().record_exception(told)
