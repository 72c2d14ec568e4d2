"""Training time and throughput."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Measures the seconds of a training over all resumptions, and tokens per second between two log records."""

    def __init__(self) -> None:
        self.start(0.0, 0)

    def start(self, seconds: float, tokens: int) -> None:
        """Start the clock at the seconds and tokens of earlier sessions of the run."""
        now = time.perf_counter()
        self.started, self._last_time, self._last_tokens = now - seconds, now, tokens

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude what happens inside, such as an evaluation, from tokens per second (but not from `seconds`)."""
        started = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - started

    def tokens_per_second(self, tokens: int) -> float:
        """Since the previous call; `tokens` is the total of the run."""
        now = time.perf_counter()
        speed = (tokens - self._last_tokens) / (now - self._last_time)
        self._last_time, self._last_tokens = now, tokens
        return speed
