"""Where metrics go: files of the run folder, and external loggers such as Weights & Biases."""
