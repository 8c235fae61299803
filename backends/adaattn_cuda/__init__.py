"""CUDA backend: kernels compiled by NVRTC on first use, launched through the driver.

Importing this package touches neither the GPU nor the disk; :mod:`adaattn_cuda.backend` is
loaded by the registry when the backend is first asked for.
"""
