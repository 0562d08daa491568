"""Operators of our own, one launch each on CUDA: kernels in Triton, and a twin of each in PyTorch."""
