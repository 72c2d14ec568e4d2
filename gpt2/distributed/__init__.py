"""Several ranks: the process group, DDP and FSDP2.

In a single process everything here is a no-op.
"""
