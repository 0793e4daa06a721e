"""Exact distributions of chains, independent of the domain: `enumeration` of masked ones, `quadrature` on the line, and `regret`."""

from rgdiff.exact import enumeration, quadrature, regret

__all__ = ["enumeration", "quadrature", "regret"]
