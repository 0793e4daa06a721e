"""Exact distributions of small discrete worlds by enumeration: those of masked chains and their path KL, tilts, soft values.

K letters at L positions make K^L sequences and (K + 1)^L partly masked states, both in C order (the last position varies
fastest; the mask is the last class). Probabilities are NumPy float64 on the host, exact for the chain of the given time grid:
one event at a time (`processes.first_hitting`), or moves that may unmask several positions at once from one prediction.
It assumes one process on sequences [L] and as many states as fit: 5^8 = 390,625 for DNA 8-mers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks
from rgdiff.processes import FirstHittingProcess, MaskedProcess
from rgdiff.rewards import score
from rgdiff.typing import Array, Cond, Denoiser, DenoiserLike, RewardLike, pytree

LARGEST = 2_000_000  # states that are still enumerated
PROBE = 64  # states on which a denoiser is asked whether it reads the time

_predict = jax.jit(lambda denoiser, x, t: jax.nn.log_softmax(denoiser(x, t, None)))


def enumerable(length: int, classes: int) -> bool:
    """Return whether the (K + 1)^L partly masked states are few enough to enumerate.

    Args:
      length: L, positions.
      classes: K, tokens without the mask.

    Returns:
      bool.
    """
    return length * np.log(classes + 1) <= np.log(LARGEST)


def tokens(length: int, classes: int) -> np.ndarray:
    """Return all sequences in C order (the last position varies fastest); with classes K + 1 all partly masked states.

    Args:
      length: L, positions.
      classes: K, tokens.

    Returns:
      Class numbers [K^L, L], int32.

    Raises:
      ValueError: for more than 2,000,000 sequences.

    Example:
      >>> from rgdiff.exact import enumeration
      >>> enumeration.tokens(2, 2).tolist()
      [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if length * np.log(classes) > np.log(LARGEST):
        raise ValueError(f"{classes}^{length} sequences are more than {LARGEST:,}: too many to enumerate")
    return np.stack(np.unravel_index(np.arange(classes**length), (classes,) * length), -1).astype(np.int32)


def codes(x: Array) -> Array:
    """Return the index of one-hot states in C order over K^L, as `tokens` lists them.

    Args:
      x: one-hot [B, L, K].

    Returns:
      [B], int32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.exact import enumeration
      >>> print(enumeration.codes(jax.nn.one_hot(jnp.array([[1, 0], [1, 1]]), 2)))
      [2 3]
    """
    length, classes = x.shape[-2:]
    return jnp.argmax(x, -1) @ jnp.asarray([classes**i for i in reversed(range(length))], jnp.int32)


def all_rewards(reward: RewardLike, length: int, classes: int, *, batch: int = 8192) -> np.ndarray:
    """Return the rewards of all sequences, in C order.

    Args:
      reward: (x0 one-hot [B, L, K], cond) -> [B]; it is called with cond = None.
      length: L, positions.
      classes: K, tokens.
      batch: sequences per call.

    Returns:
      [K^L], in the reward's unit; NaN where a sequence is infeasible.

    Raises:
      ValueError: for too many sequences.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.exact import enumeration
      >>> reward = rgdiff.typing.Function(lambda x0, cond: x0[:, :, 1].sum(-1))  # number of ones
      >>> enumeration.all_rewards(reward, 2, 2).tolist()
      [0.0, 1.0, 1.0, 2.0]
    """
    every = tokens(length, classes)
    return _in_batches(lambda x: score(reward, x), every, classes, batch)


@pytree
class Factorised:
    """The exact denoiser of independent positions: the same logits whatever has been unmasked.

    Args:
      logits: [L, K], nats.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rgdiff.exact import enumeration
      >>> denoiser = enumeration.Factorised(jnp.zeros((3, 2)))
      >>> denoiser(jax.nn.one_hot(jnp.full((4, 3), 2), 3), 1.0).shape
      (4, 3, 2)
    """

    logits: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        return jnp.broadcast_to(self.logits, (x.shape[0], *self.logits.shape))


class Tilted(NamedTuple):
    """p(x) exp(r(x)/tau) / Z over all sequences: its probabilities [K^L], log Z, KL to p in nats, and mean reward."""

    probabilities: np.ndarray
    log_z: float
    kl: float
    reward_mean: float


def tilted(law: np.ndarray, rewards: np.ndarray, temperature: float) -> Tilted:
    """Tilt probabilities by rewards: p*(x) = p(x) exp(r(x)/tau) / Z.

    log Z = log E_p exp(r/tau),  KL(p* || p) = E*[r]/tau - log Z.

    Args:
      law: p [n], probabilities.
      rewards: r [n]; NaN (infeasible) gets no weight.
      temperature: tau, in the reward's unit; infinity conditions on feasibility alone.

    Returns:
      Tilted(probabilities [n], log_z nats, kl nats, reward_mean in the reward's unit).

    Raises:
      ValueError: for differing shapes, or a temperature that is not positive.

    Example:
      >>> import numpy as np
      >>> from rgdiff.exact import enumeration
      >>> tilted = enumeration.tilted(np.array([0.5, 0.5]), np.log([1.0, 3.0]), temperature=1.0)
      >>> print(tilted.probabilities.round(4), f"{tilted.log_z:.4f}")  # log((1 + 3) / 2)
      [0.25 0.75] 0.6931
    """
    law, rewards = np.asarray(law, np.float64), np.asarray(rewards, np.float64)
    if law.shape != rewards.shape or law.ndim != 1:
        raise ValueError(
            f"expected a law and rewards of one shape [n], got {list(law.shape)} and {list(rewards.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
    feasible = ~np.isnan(rewards) & (law > 0)
    scores = np.where(feasible, rewards, 0.0) / temperature
    highest = scores[feasible].max()
    weights = np.where(feasible, law * np.exp(np.where(feasible, scores - highest, 0.0)), 0.0)
    total = weights.sum()
    p = weights / total
    log_z = float(np.log(total) + highest)
    return Tilted(p, log_z, float(p @ scores) - log_z, float(p @ np.where(feasible, rewards, 0.0)))


def product_law(probabilities: np.ndarray) -> np.ndarray:
    """Return the probabilities of all sequences of independent positions.

    Args:
      probabilities: [L, K]; rows are normalised.

    Returns:
      [K^L], in C order.

    Example:
      >>> import numpy as np
      >>> from rgdiff.exact import enumeration
      >>> print(enumeration.product_law(np.array([[0.5, 0.5], [0.25, 0.75]])))
      [0.125 0.375 0.125 0.375]
    """
    law = np.ones(1)
    for row in np.asarray(probabilities, np.float64):
        law = np.multiply.outer(law, row / row.sum()).reshape(-1)
    return law


def chain_law(process: MaskedProcess, denoiser: DenoiserLike, times: Array, *, batch: int = 8192) -> np.ndarray:
    """Return the exact distribution of x0 of ancestral sampling over `times`, errors of network and discretisation included.

    p_s(y) = sum_x p_t(x) prod_i k_i(y_i | x), pushed forward over all (K + 1)^L states; k_i copies an unmasked letter,
    and a masked one is unmasked with probability (rate_t - rate_s)/rate_t. The cost is (2K + 1)^L products a move (4.3e7 for
    DNA 8-mers), and one network call a state where the denoiser ignores t, one a move and state where it depends on it.

    For a first-hitting process p(y) = sum_x p(x) p_i(y_i | x) / m over the m masked positions i of x. A state occurs at one
    move alone, so all moves together cost one network call a state and L K (K + 1)^(L - 1) products.

    Args:
      process: masked or first-hitting, on sequences [L].
      denoiser: (x, t, cond) -> logits [B, L, K]; it is called with cond = None.
      times: [T + 1], of the chain.
      batch: states per network call.

    Returns:
      Probabilities [K^L], in C order, float64.

    Raises:
      ValueError: for another process, too many states, or a bad grid.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.exact import enumeration
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 2, classes=2)
      >>> prior = enumeration.Factorised(jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]])))
      >>> print(enumeration.chain_law(process, prior, process.times(3)).round(4))
      [0.125 0.375 0.125 0.375]
    """
    return _push(process, denoiser, times, None, batch).probabilities


class ChainLaw(NamedTuple):
    """Probabilities [K^L] of a chain's x0, and the chain's path KL to a reference's, nats (0 without a reference)."""

    probabilities: np.ndarray
    path_kl: float


def chain_law_and_kl(
    process: MaskedProcess, denoiser: DenoiserLike, times: Array, reference: DenoiserLike, *, batch: int = 8192
) -> ChainLaw:
    """Return the distribution of x0 and the path KL of a tuned chain to the chain of the prior, both exact, in one pass.

    KL = sum over moves of E[P(move) * sum over masked positions of KL(p_i(. | x_t) || q_i(. | x_t))], P(move) the probability
    (rate_t - rate_s)/rate_t of a masked position to be unmasked, or 1/m where one of m is (first-hitting). It is at least
    KL(p(x0) || the prior's), and equal to it where both have the same p(path | x0). E[r] - alpha * path_kl is the objective of
    `tuners.drakes`; of a first-hitting chain of the exact prior its maximum is alpha * log Z of `tilted`.

    Args:
      process, times, batch: as for `chain_law`.
      denoiser, reference: the tuned one and the prior's, (x, t, cond) -> logits [B, L, K].

    Returns:
      ChainLaw(probabilities [K^L], path_kl in nats).

    Raises:
      ValueError: as for `chain_law`.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> from rgdiff.exact import enumeration
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 1, classes=2)
      >>> tuned, prior = (enumeration.Factorised(jnp.log(jnp.array([p]))) for p in ([0.25, 0.75], [0.5, 0.5]))
      >>> print(f"{enumeration.chain_law_and_kl(process, tuned, process.times(3), prior).path_kl:.4f}")  # log 2 - entropy
      0.1308
    """
    return _push(process, denoiser, times, reference, batch)


@pytree
class SoftValue:
    """tau log E[exp(r(x0)/tau) | x_t] by look-up: a table [n, (K + 1)^L] at n times, of which the nearest is taken."""

    times: Array
    table: Array

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        return self.table[jnp.argmin(jnp.abs(self.times - t))][codes(x)]


def product_value(probabilities: np.ndarray, rewards: np.ndarray, temperature: float) -> SoftValue:
    """Return the exact soft value of a prior with independent positions: v(x_t) = tau log sum_x0 p(x0 | x_t) exp(r(x0)/tau).

    It depends on the state alone, whatever the times of the chain, and all (K + 1)^L states come from one contraction a position.

    Args:
      probabilities: of the prior, [L, K].
      rewards: [K^L], see `all_rewards`; NaN has no weight.
      temperature: tau, in the reward's unit.

    Returns:
      The value, (x [B, L, K + 1], t, cond) -> [B], in the reward's unit.

    Raises:
      ValueError: for a temperature that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from rgdiff.exact import enumeration
      >>> value = enumeration.product_value(np.array([[0.5, 0.5]]), np.log([1.0, 3.0]), temperature=1.0)
      >>> print(f"{value(jax.nn.one_hot(jnp.array([[2]]), 3), 1.0)[0]:.4f}")  # masked: log((1 + 3) / 2)
      0.6931
    """
    probabilities = np.asarray(probabilities, np.float64)
    probabilities = probabilities / probabilities.sum(-1, keepdims=True)
    length, classes = probabilities.shape
    weights, highest = _weights(rewards, temperature)
    weights = weights.reshape((classes,) * length)
    for i in range(length):
        mean = np.tensordot(probabilities[i], weights, (0, i))
        weights = np.concatenate([weights, np.expand_dims(mean, i)], i)
    return _soft_value(np.zeros(1), weights[None], highest, temperature)


def chain_value(
    process: MaskedProcess,
    denoiser: DenoiserLike,
    times: Array,
    rewards: np.ndarray,
    temperature: float,
    *,
    batch: int = 8192,
) -> SoftValue:
    """Return the exact soft value of a prior's own chain over `times`, by dynamic programming from its end.

    exp(v_t(x)/tau) = sum_y p(x_s = y | x_t = x) exp(v_s(y)/tau), v_0 = r (arXiv 2408.08252, soft Bellman equations). With it
    SVDD and SMC tend to `tilted(chain_law(...))`. Costs as `chain_law`; holds one table of states for each time. For a
    first-hitting process the value depends on the state alone, and one table serves all times.

    Args:
      process, denoiser, times, batch: as for `chain_law`.
      rewards: [K^L], see `all_rewards`; NaN has no weight.
      temperature: tau, in the reward's unit.

    Returns:
      The value, (x [B, L, K + 1], t, cond) -> [B], in the reward's unit.

    Raises:
      ValueError: as for `chain_law`, or for a temperature that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, rgdiff
      >>> from rgdiff.exact import enumeration
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 1, classes=2)
      >>> prior = enumeration.Factorised(jnp.zeros((1, 2)))
      >>> value = enumeration.chain_value(process, prior, process.times(3), np.log([1.0, 3.0]), temperature=1.0)
      >>> print(f"{value(jax.nn.one_hot(jnp.array([[2]]), 3), 1.0)[0]:.4f}")  # masked: log((1 + 3) / 2)
      0.6931
    """
    length, classes = sizes(process)
    weights, highest = _weights(rewards, temperature)
    value = np.zeros((classes + 1,) * length)
    value[(slice(0, classes),) * length] = weights.reshape((classes,) * length)
    if isinstance(process, FirstHittingProcess):
        table = _events(process, denoiser, times, batch)
        for mask, here, _ in sorted(_patterns(length, classes), key=lambda pattern: len(pattern[0])):
            for i in mask:
                known = (*here[:i], slice(0, classes), *here[i + 1 :])
                value[here] += (value[known] * _token(table, here, i)).sum(i, keepdims=True) / len(mask)
        return _soft_value(np.zeros(1), value[None], highest, temperature)
    tables = [value]
    for stay, table in reversed(list(_moves(process, denoiser, times, batch))):
        new = np.zeros_like(value)
        for mask, here, reached in _patterns(length, classes):
            mean = value[reached]
            for i in mask:
                mean = (mean * _position(table, here, i, stay)).sum(i, keepdims=True)
            new[here] = mean
        value = new
        tables.append(value)
    return _soft_value(np.asarray(times, np.float64), np.stack(tables[::-1]), highest, temperature)


def sizes(process: Any) -> tuple[int, int]:
    """Return L and K of a process that can be enumerated, and refuse another.

    Args:
      process: any process.

    Returns:
      L, K.

    Raises:
      ValueError: for a process that is not masked, or not on sequences [L], or with too many states.
    """
    if not isinstance(process, MaskedProcess) or len(process.shape) != 1:
        raise ValueError("enumeration is for a masked process on sequences [L]")
    if not enumerable(process.shape[0], process.classes):
        raise ValueError(
            f"{process.classes + 1}^{process.shape[0]} partly masked states are more than {LARGEST:,}: too many to enumerate"
        )
    return process.shape[0], process.classes


def _weights(rewards: np.ndarray, temperature: float) -> tuple[np.ndarray, float]:
    """exp((r - max r)/tau), 0 for NaN, and max r."""
    if not temperature > 0:
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
    rewards = np.asarray(rewards, np.float64)
    highest = float(np.nanmax(rewards))
    return np.where(np.isnan(rewards), 0.0, np.exp((np.nan_to_num(rewards) - highest) / temperature)), highest


def _soft_value(times: np.ndarray, weights: np.ndarray, highest: float, temperature: float) -> SoftValue:
    with np.errstate(divide="ignore"):  # log 0 = -inf: a state that leads to infeasible sequences alone
        table = highest + temperature * np.log(weights.reshape(len(times), -1))
    return SoftValue(jnp.asarray(times, jnp.float32), jnp.asarray(table, jnp.float32))


def _patterns(length: int, classes: int) -> Iterator[tuple[tuple[int, ...], tuple, tuple]]:
    """Yield, for every set of masked positions, the set, its states, and the states that a move can reach, as index slices."""
    known, at_mask, anything = slice(0, classes), slice(classes, classes + 1), slice(0, classes + 1)
    for masked in itertools.product((False, True), repeat=length):
        here = tuple(at_mask if m else known for m in masked)
        reached = tuple(anything if m else known for m in masked)
        yield tuple(i for i, m in enumerate(masked) if m), here, reached


def _push(process: Any, denoiser: Denoiser, times: Array, reference: Denoiser | None, batch: int) -> ChainLaw:
    """Push the law of the state, and the path KL to a reference where there is one, through the chain."""
    length, classes = sizes(process)
    law, path_kl = np.zeros((classes + 1,) * length), 0.0
    law[(classes,) * length] = 1.0
    sequences = (slice(0, classes),) * length
    if isinstance(process, FirstHittingProcess):
        table = _events(process, denoiser, times, batch)
        other = None if reference is None else _events(process, reference, times, batch)
        for mask, here, _ in sorted(_patterns(length, classes), key=lambda pattern: -len(pattern[0])):
            for i in mask:
                mass = law[here] / len(mask)
                law[(*here[:i], slice(0, classes), *here[i + 1 :])] += mass * _token(table, here, i)
                path_kl += 0.0 if other is None else _divergence(mass, table, other, here, i)
        return ChainLaw(law[sequences].reshape(-1), path_kl)
    others = itertools.repeat((0.0, None)) if reference is None else _moves(process, reference, times, batch)
    for (stay, table), (_, other) in zip(_moves(process, denoiser, times, batch), others, strict=False):
        new = np.zeros_like(law)
        for mask, here, reached in _patterns(length, classes):
            mass = law[here]
            if mass.any():
                for i in mask:
                    path_kl += 0.0 if other is None else (1 - stay) * _divergence(law[here], table, other, here, i)
                    mass = mass * _position(table, here, i, stay)
                new[reached] += mass
        law = new
    return ChainLaw(law[sequences].reshape(-1), path_kl)


def _token(table: np.ndarray, here: tuple, i: int) -> np.ndarray:
    """Law of the letter that masked position i of the states `here` takes, along axis i."""
    return np.swapaxes(table[here][..., i, :], i, -1)[..., 0]


def _position(table: np.ndarray, here: tuple, i: int, stay: float) -> np.ndarray:
    """Law of the letter at masked position i of the states `here`: K moves and staying masked, along axis i."""
    p = _token(table, here, i)
    return np.concatenate([(1 - stay) * p, np.full(p.take([0], i).shape, stay)], i)


def _divergence(mass: np.ndarray, table: np.ndarray, other: np.ndarray, here: tuple, i: int) -> float:
    """sum over the states `here` of mass * KL(p_i || q_i), nats."""
    p, q = (np.asarray(one[here][..., i, :], np.float64) for one in (table, other))
    some = (p > 0) & (mass > 0)[..., None]
    with np.errstate(divide="ignore"):  # q = 0 < p: infinitely far apart
        ratio = np.log(np.where(some, p, 1.0)) - np.log(np.where(some, q, 1.0))
    return float((mass[..., None] * p * ratio).sum())


def _events(process: Any, denoiser: Denoiser, times: Array, batch: int) -> np.ndarray:
    """p(x0_i | x) as [K + 1] * L + [L, K], float32, every state at the one time at which a first-hitting chain meets it."""
    length, classes = sizes(process)
    grid = checks.times(times, process)
    if grid.shape[0] != length + 1:
        raise ValueError(f"one event at a time takes {length} moves (positions), got {grid.shape[0] - 1}; use times()")
    every = tokens(length, classes + 1)
    masked = (every == classes).sum(1)
    logits = np.zeros((len(every), length, classes), np.float32)  # nothing is asked of sequences without a mask
    for count in range(1, length + 1):
        at, t = masked == count, grid[length - count]
        logits[at] = _in_batches(lambda x: _predict(denoiser, x, t), every[at], classes + 1, batch)  # noqa: B023
    return np.exp(logits).reshape(*(classes + 1,) * length, length, classes)


def _moves(process: MaskedProcess, denoiser: Denoiser, times: Array, batch: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield, for every move t -> s, the probability to stay masked and p(x0_i | x_t) as [K + 1] * L + [L, K], float32."""
    length, classes = sizes(process)
    grid = checks.times(times, process)
    rates = np.asarray(process.schedule.rate(grid), np.float64)
    every = tokens(length, classes + 1)
    few = every[np.random.RandomState(0).choice(len(every), min(PROBE, len(every)), replace=False)]
    before = table = None
    for i in range(len(rates) - 1):
        probe = _in_batches(lambda x: _predict(denoiser, x, grid[i]), few, classes + 1, PROBE)  # noqa: B023
        if before is None or not np.array_equal(before, probe):
            logits = _in_batches(lambda x: _predict(denoiser, x, grid[i]), every, classes + 1, batch)  # noqa: B023
            table = np.exp(logits).reshape(*(classes + 1,) * length, length, classes)
            before = probe
        assert table is not None
        yield float(rates[i + 1] / rates[i]), table


def _in_batches(function, rows: np.ndarray, classes: int, batch: int) -> np.ndarray:
    """Evaluate a compiled function on one-hot rows, `batch` at a time, the last filled up so that one program serves all."""
    out = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        size = min(batch, len(rows))
        filled = np.concatenate([part, np.broadcast_to(part[-1:], (size - len(part), rows.shape[1]))])
        out.append(np.asarray(function(jax.nn.one_hot(filled, classes, dtype=jnp.float32)))[: len(part)])
    return np.concatenate(out)
