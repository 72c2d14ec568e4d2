"""Kernels: attention, cross-entropy, matrix products, CPU inference.

Each module states what it computes and its measured gain. Nothing here knows about `GPT2Model`.
"""
