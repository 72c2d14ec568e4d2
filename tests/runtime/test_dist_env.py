"""The environment variables of torchrun."""

import pytest

from gpt2.errors import UserError
from gpt2.runtime.dist_env import dist_env


def test_missing_variables_are_named(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT"):
        dist_env.__wrapped__()
