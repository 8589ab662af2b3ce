"""Triton kernels of the layers. Each file is imported only where Triton is: it comes with torch's
builds for CUDA."""
