"""Models on disk: the checkpoint format, run folders, Hugging Face folders, trained models by name."""
