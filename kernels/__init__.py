"""Triton kernels, one family a file, each with a page of physics and a plain PyTorch twin; begin with README.md there."""
