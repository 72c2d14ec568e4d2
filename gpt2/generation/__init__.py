"""From logits to text: key-value caches, the decoding loop, sampling filters, the interactive session, prompt files.

Models are used through a protocol, so that `GPT2Model.generate` may import this package.
"""
