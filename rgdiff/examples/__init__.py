"""Tutorials that run: `python -m rgdiff.examples.NAME`; rgdiff/docs/examples.md lists them. Each asserts what it says."""
