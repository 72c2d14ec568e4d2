"""Where metrics go: files of the run folder, and Weights & Biases."""
