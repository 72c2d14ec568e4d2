"""Benchmarks of language models: the questions of each, log-likelihoods of the answers, and figures with standard
errors. The loss on a corpus is in `gpt2.evaluate`.
"""
