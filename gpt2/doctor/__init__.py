"""`python -m gpt2.main doctor`: what a machine has, whether it computes right, and how fast it is.

A check is a function of a `Machine` that returns a `Row`; `gpt2.doctor.run` lists all checks. This package imports the
product and the benchmarks; neither imports it.
"""
