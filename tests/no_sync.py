"""Skip fsync: no test cuts the power, and a study of 20 trials would wait for 1,500 transactions.

Imports nothing but the standard library, because `tests/site` calls it when Python starts.
"""

import os
import sqlite3
from functools import wraps
from typing import Any


def skip_disk_sync() -> None:
    """Make `os.fsync` do nothing, and switch it off in each connection to SQLite."""
    connect = sqlite3.dbapi2.connect

    @wraps(connect)
    def connect_without_sync(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    os.fsync = lambda _descriptor: None
    sqlite3.connect = sqlite3.dbapi2.connect = connect_without_sync
