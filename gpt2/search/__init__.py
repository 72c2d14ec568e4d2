"""Hyperparameter studies on Optuna: trials, leases, storage, reports.

The Hydra side of a study is `gpt2.cli.sweeper`.
"""
