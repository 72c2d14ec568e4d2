"""Text to token files: where documents come from, and how they are tokenized and packed.

Batches are made in `gpt2.data_loader`.
"""
