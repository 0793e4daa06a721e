"""BLOSUM62 (Henikoff and Henikoff 1992, doi:10.1073/pnas.89.22.10915), the similarity of amino acids, in half-bits."""

from __future__ import annotations

import numpy as np

# Rows and columns in the order of the alphabet, ACDEFGHIKLMNPQRSTVWY.
MATRIX = np.array(
    """
    4 0 -2 -1 -2 0 -2 -1 -1 -1 -1 -2 -1 -1 -1 1 0 0 -3 -2
    0 9 -3 -4 -2 -3 -3 -1 -3 -1 -1 -3 -3 -3 -3 -1 -1 -1 -2 -2
    -2 -3 6 2 -3 -1 -1 -3 -1 -4 -3 1 -1 0 -2 0 -1 -3 -4 -3
    -1 -4 2 5 -3 -2 0 -3 1 -3 -2 0 -1 2 0 0 -1 -2 -3 -2
    -2 -2 -3 -3 6 -3 -1 0 -3 0 0 -3 -4 -3 -3 -2 -2 -1 1 3
    0 -3 -1 -2 -3 6 -2 -4 -2 -4 -3 0 -2 -2 -2 0 -2 -3 -2 -3
    -2 -3 -1 0 -1 -2 8 -3 -1 -3 -2 1 -2 0 0 -1 -2 -3 -2 2
    -1 -1 -3 -3 0 -4 -3 4 -3 2 1 -3 -3 -3 -3 -2 -1 3 -3 -1
    -1 -3 -1 1 -3 -2 -1 -3 5 -2 -1 0 -1 1 2 0 -1 -2 -3 -2
    -1 -1 -4 -3 0 -4 -3 2 -2 4 2 -3 -3 -2 -2 -2 -1 1 -2 -1
    -1 -1 -3 -2 0 -3 -2 1 -1 2 5 -2 -2 0 -1 -1 -1 1 -1 -1
    -2 -3 1 0 -3 0 1 -3 0 -3 -2 6 -2 0 0 1 0 -3 -4 -2
    -1 -3 -1 -1 -4 -2 -2 -3 -1 -3 -2 -2 7 -1 -2 -1 -1 -2 -4 -3
    -1 -3 0 2 -3 -2 0 -3 1 -2 0 0 -1 5 1 0 -1 -2 -2 -1
    -1 -3 -2 0 -3 -2 0 -3 2 -2 -1 0 -2 1 5 -1 -1 -3 -3 -2
    1 -1 0 0 -2 0 -1 -2 0 -2 -1 1 -1 0 -1 4 1 -2 -3 -2
    0 -1 -1 -1 -2 -2 -2 -1 -1 -1 -1 0 -1 -1 -1 1 5 0 -2 -2
    0 -1 -3 -2 -1 -3 -3 3 -2 1 1 -3 -2 -2 -3 -2 0 4 -3 -1
    -3 -2 -4 -3 1 -2 -2 -3 -3 -2 -1 -4 -4 -2 -3 -3 -2 -3 11 2
    -2 -2 -3 -2 3 -3 2 -1 -2 -1 -1 -2 -3 -1 -2 -2 -2 -1 2 7
    """.split(),
    int,
).reshape(20, 20)


def distance(tokens: np.ndarray, wild: np.ndarray) -> np.ndarray:
    """Return how far variants are from the wild type: the similarity that its letters lose, summed over positions.

    d(x) = sum_l B[w_l, w_l] - B[w_l, x_l], B being BLOSUM62: 0 for the wild type, above for any other.

    Args:
      tokens: [N, L], letters as classes of the alphabet.
      wild: [L].

    Returns:
      int [N], half-bits.

    Example:
      >>> import numpy as np
      >>> from rgdiff.domains.proteins import blosum
      >>> print(blosum.distance(np.array([[0, 18], [0, 19]]), np.array([0, 18])))  # W to Y: 11 - 2
      [0 9]
    """
    return (MATRIX[wild, wild] - MATRIX[wild, tokens]).sum(-1)
