"""``python -m bench.gpu``: proves and measures the CUDA half on a GPU, in under ten minutes."""
