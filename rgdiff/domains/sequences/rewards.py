"""Rewards on sequences: a table of all sequences, GC content, motifs, and a learned oracle.

Each is a callable pytree (x0, cond) -> [B] on one-hot sequences [B, L, K] that also takes points of the simplex, as a
posterior mean is: what is linear in every position (the table, GC content) then returns the exact expectation over
independent letters, the others their value at the point. None holds a temperature. Training an oracle is left to
`rgdiff.domains.sequences.oracle`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff.typing import Array, Cond, Reward, pytree

IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip


@pytree
class Table:
    """The reward of every sequence; see `table`."""

    matrix: Array  # [K^a, K^b]: the first a positions, the last b

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        half = x0.shape[1] // 2
        left, right = _joint(x0[:, :half]), _joint(x0[:, half:])
        return jnp.sum(jnp.matmul(left, self.matrix, precision=jax.lax.Precision.HIGHEST) * right, -1)


def _joint(x: Array) -> Array:
    """Joint law of independent letters: [B, n, K] -> [B, K^n] in C order."""
    x = x.astype(jnp.float32)
    out = jnp.ones((x.shape[0], 1), jnp.float32)
    for i in range(x.shape[1]):
        out = (out[:, :, None] * x[:, i, None, :]).reshape(x.shape[0], -1)
    return out


def table(values: Array | np.ndarray, length: int, classes: int) -> Reward:
    """Reward by a table of all sequences, r(x) = sum_z values[z] prod_i x_i[z_i].

    On one-hot sequences it looks up; on points of the simplex it is the exact expectation over independent letters,
    by K^L multiplications for each, as one matrix product between the two halves of the positions.

    Args:
      values: [K^L] in C order (the last position runs fastest).

    Raises:
      ValueError: for another number of values, or for NaN: a table has no infeasible sequences, since one of them would
        make every expectation infeasible.
    """
    values = np.asarray(values, np.float32)
    if values.shape != (classes**length,):
        raise ValueError(
            f"expected {classes}^{length} = {classes**length} values [K^L], got shape {list(values.shape)}"
        )
    if not np.isfinite(values).all():
        raise ValueError("a table reward must be finite for every sequence; give infeasible ones a low value")
    return Table(jnp.asarray(values.reshape(classes ** (length // 2), -1)))


@pytree
class GC:
    """Share of G and C; see `gc`."""

    weight: Array
    target: Array | None

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        share = jnp.mean(x0 @ self.weight, -1)
        return share if self.target is None else -((share - self.target) ** 2)


def gc(letters: str = "ACGT", target: float | None = None) -> Reward:
    """Reward GC content: r(x) = (number of G and C)/L, or -(that - target)^2.

    Args:
      letters: of the alphabet, in order.
      target: the share aimed at, in [0, 1], dynamic; None for the more the better.

    Raises:
      ValueError: for an alphabet without G and C as nucleotides, or a target outside [0, 1].
    """
    if not set(letters) <= set("ACGTU"):
        raise ValueError(f"GC content is for DNA and RNA, got letters {letters}")
    if isinstance(target, int | float) and not 0 <= target <= 1:
        raise ValueError(f"target={target}: expected a share of G and C in [0, 1], or None to reward all")
    weight = jnp.asarray([float(letter in "GC") for letter in letters], jnp.float32)
    return GC(weight, None if target is None else jnp.asarray(target, jnp.float32))


@pytree
class Motif:
    """The best match of a motif; see `motif`."""

    scores: Array  # [S, W, K], one for each strand

    def __call__(self, x0: Array, cond: Cond = None) -> Array:
        width = self.scores.shape[1]
        windows = jnp.stack([x0[:, i : x0.shape[1] - width + 1 + i] for i in range(width)], 2)  # [B, L - W + 1, W, K]
        matches = jnp.einsum("blwk,swk->bls", windows, self.scores, precision=jax.lax.Precision.HIGHEST)
        return jnp.max(matches, (1, 2))


def pwm(consensus: str, letters: str = "ACGT", weight: float = 0.9) -> np.ndarray:
    """Return the position weight matrix [W, K] of a consensus in IUPAC letters: `weight` shared by the letters it allows.

    Raises:
      ValueError: for an unknown letter, or a weight that is not between a uniform and a sure one.
    """
    consensus = consensus.upper()
    unknown = sorted(set(consensus) - set(IUPAC))
    if unknown or not consensus:
        raise ValueError(
            f"motif {consensus!r}: expected IUPAC letters {''.join(IUPAC)}, found {''.join(unknown) or 'none'}"
        )
    if not 0.25 < weight <= 1:
        raise ValueError(f"weight={weight}: expected the share of the allowed letters, in (0.25, 1]")
    names = letters.replace("U", "T")
    allowed = np.array([[float(letter in IUPAC[c]) for letter in names] for c in consensus])
    counts = allowed.sum(1, keepdims=True)
    rest = np.where(counts < len(names), (1 - weight) / np.maximum(len(names) - counts, 1), 0.0)
    inside = np.where(counts < len(names), weight, 1.0) / counts
    return np.where(allowed > 0, inside, rest)


def motif(
    matrix: Array | np.ndarray | Sequence[Sequence[float]],
    letters: str = "ACGT",
    background: Sequence[float] | None = None,
    both_strands: bool = False,
    pseudocount: float = 1e-3,
) -> Reward:
    """Reward the best match of a motif, in nats: r(x) = max_j sum_w log p_w(x_{j+w}) / q(x_{j+w}).

    Args:
      matrix: [W, K], probabilities or counts of each letter at each position of the motif, e.g. `pwm("TGACTCA")`.
      background: q [K]; uniform when None.
      both_strands: also match the reverse complement (DNA and RNA).
      pseudocount: added to the probabilities, so that no letter scores -inf.

    Raises:
      ValueError: for a matrix that does not fit the letters, is negative, or has an empty row.

    Note: on a point of the simplex each window's score is the expected one, but the maximum is taken of expectations.
    """
    p = np.asarray(matrix, np.float64)
    if p.ndim != 2 or p.shape[1] != len(letters) or not len(p) or (p < 0).any() or (p.sum(1) <= 0).any():
        raise ValueError(f"expected a motif [W, {len(letters)}] of probabilities or counts, got shape {list(p.shape)}")
    q = np.full(len(letters), 1 / len(letters)) if background is None else np.asarray(background, np.float64)
    if q.shape != (len(letters),) or (q <= 0).any():
        raise ValueError(f"expected a positive background [{len(letters)}], got {background!r}")
    p = p / p.sum(1, keepdims=True) + pseudocount
    scores = np.log(p / p.sum(1, keepdims=True)) - np.log(q / q.sum())
    strands = [scores]
    if both_strands:
        names = letters.replace("U", "T")
        if set(names) != set("ACGT"):
            raise ValueError(f"both_strands is for DNA and RNA, got letters {letters}")
        strands.append(scores[::-1][:, [names.index("TGCA"["ACGT".index(n)]) for n in names]])
    return Motif(jnp.asarray(np.stack(strands), jnp.float32))
