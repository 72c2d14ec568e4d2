"""Kernels: attention, cross-entropy, matrix products, layers for CPU inference.

Each module states what it computes and what it was measured to gain. Nothing here depends on `GPT2Model`.
"""
