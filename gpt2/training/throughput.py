"""How fast a training goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Counts the seconds of a training over all resumptions, and the tokens a second since it was last asked."""

    def __init__(self) -> None:
        self.begin(0.0, 0)

    def begin(self, seconds: float, tokens: int) -> None:
        """From here on; so many seconds were spent and so many tokens predicted before."""
        now = time.perf_counter()
        self.began, self._asked, self._tokens = now - seconds, now, tokens

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens within says nothing of the speed of training."""
        began = time.perf_counter()
        yield
        self._asked += time.perf_counter() - began

    def tokens_per_second(self, tokens: int) -> float:
        """Since the last time that this was asked; `tokens` are all that were predicted so far."""
        now = time.perf_counter()
        speed = (tokens - self._tokens) / (now - self._asked)
        self._asked, self._tokens = now, tokens
        return speed
