"""Side-by-side measurements against PyTorch: `python -m benchmarks.run`. Not part of the library."""
