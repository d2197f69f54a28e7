"""The executor of PyTorch: `model` loads, `attention` reads and writes the KV pool, `native` has kernels in C++."""
