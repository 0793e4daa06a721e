"""Side-by-side measurements against PyTorch: `python -m benchmarks.speed`. Not part of the library."""
