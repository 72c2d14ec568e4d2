"""The command line: composition by Hydra, validation before a run, resuming, sweeps, messages.

Only this package imports hydra.
"""
