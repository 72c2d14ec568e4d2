"""Training time and tokens per second, on a clock that the test moves."""

import pytest

from gpt2.training import throughput
from gpt2.training.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_tokens_per_second_are_those_since_the_previous_call(clock):
    measured = Throughput()
    clock.now += 4.0
    assert measured.tokens_per_second(200) == 50.0
    clock.now += 5.0
    assert measured.tokens_per_second(300) == 20.0


def test_a_pause_counts_as_time_but_not_for_the_speed(clock):
    measured = Throughput()
    clock.now += 1.0
    with measured.pause():
        clock.now += 10.0
    clock.now += 3.0
    assert measured.tokens_per_second(100) == 25.0
    assert measured.seconds == 14.0
    clock.now += 2.0
    assert measured.tokens_per_second(110) == 5.0  # the pause is over


def test_a_resumed_run_continues_its_time_and_tokens(clock):
    measured = Throughput()
    clock.now += 100.0
    measured.start(seconds=60.0, tokens=1000)
    clock.now += 2.0
    assert measured.seconds == 62.0
    assert measured.tokens_per_second(1100) == 50.0
