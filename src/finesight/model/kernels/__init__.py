"""Triton kernels of the layers; imported only if Triton is installed (torch's CUDA builds)."""
