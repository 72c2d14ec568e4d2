"""Run a script with fewer rights: `limited.py user SCRIPT ARGUMENT ...`, or `full` instead of `user`.

`user` drops root's right to read and write every file; `full` limits the size of files, like a full disk.
"""

import ctypes
import resource
import runpy
import sys

BYTES = 4096  # the size limit of a file


def give_up_rights() -> None:
    """Drop all Linux capabilities, so that permissions of files count for root too."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the structure, this process
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    kind, *sys.argv = sys.argv[1:]
    if kind == "user":
        give_up_rights()
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
