"""Terminal output."""

import pytest

from gpt2.runtime.console import time_left


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3661, "1:01:01"), (None, "-:--"), (float("inf"), "-:--")]
)
def test_time_left_format(seconds, text):
    assert time_left(seconds) == text
