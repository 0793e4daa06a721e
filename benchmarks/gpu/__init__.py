"""One script for one GPU: rgdiff in bfloat16 beside PyTorch, eager and compiled, under ten minutes."""
