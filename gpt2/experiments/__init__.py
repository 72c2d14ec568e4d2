"""Recorded studies: the code that plans, runs and reports a folder of `experiments/`."""
