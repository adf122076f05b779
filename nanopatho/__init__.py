"""nanopatho: Patho-R1 in plain PyTorch, small enough to read. One idea a file; start with vlm.py, then train_rl.py."""
