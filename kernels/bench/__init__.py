"""`python -m kernels.bench`: how fast the kernels are (see `__main__.py`)."""
