import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads cannot be forked
os.environ["WANDB_MODE"] = "disabled"
