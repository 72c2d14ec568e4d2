"""Decoding and sampling: key-value cache, decoding loop, sampling filters, text streams, interactive session, prompts.

Models are described by a protocol, so that `GPT2Model.generate` may use this package.
"""
