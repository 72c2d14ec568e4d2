"""Decoding and sampling: key-value cache, decoding loop, sampling filters, text streams, interactive session, prompts.

Models are seen through a protocol, so that `GPT2Model.generate` may use this package.
"""
