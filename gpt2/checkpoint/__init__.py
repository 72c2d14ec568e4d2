"""Trained models on disk: the checkpoint format, the records in it, the checkpoints of a run folder, the format of
`transformers`, and opening any trained model by its name. Training state is collected in `gpt2.training.state`, not
here.
"""
