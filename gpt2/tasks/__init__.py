"""The benchmarks of the field: what each asks of a document, log-likelihoods of its answers, and figures with their
standard errors. Not here: the loss on a corpus, which is `gpt2.evaluate`.
"""
