"""Plans as work lists: geometry, and the records that kernels read. Knows nothing of CUDA."""
