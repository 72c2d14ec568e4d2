"""What a training step is made of: optimizer, schedule, precision and compilation, non-finite guard, state, callbacks.

The loop itself is `gpt2.train`.
"""
