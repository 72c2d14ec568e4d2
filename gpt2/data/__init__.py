"""From text to files of tokens: the sources of documents, and how documents are tokenized, packed and cached.

Batches are made in `gpt2.data_loader`.
"""
