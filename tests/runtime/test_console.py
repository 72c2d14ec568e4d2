"""What stands on the terminal."""

import pytest

from gpt2.runtime.console import time_left


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3661, "1:01:01"), (None, "-:--"), (float("inf"), "-:--")]
)
def test_time_left_is_written_as_clocks_do(seconds, text):
    assert time_left(seconds) == text
