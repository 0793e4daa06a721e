"""Distributions of the next state: `Gaussian`, `Categorical`, `Absorbing`, `FirstHitting`, `Fixed` and `Product`; `PointMass` and `Drawn` have no density.

A kernel is a pytree with leading axis B; log-probabilities, KL and entropy are in nats, summed over one example, and
exact in log-space (no clamping of weights). Discrete states are one-hot; `relaxation` names the gradient that a draw
passes back. `rgdiff.processes` turns a network's prediction into a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.typing import Array, Key, State, pytree, static

RELAXATIONS = ("straight_through", "gumbel", "reinmax", "relaxed")


def _total(x: Array) -> Array:
    """Sum over everything but the leading axis: [B, ...] -> [B]."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


@pytree
class Gaussian:
    """The normal distribution N(mean, std^2) with independent coordinates.

    Args:
      mean: [B, ...], in data units.
      std: standard deviation, broadcastable to `mean`, positive.
      where: bool, broadcastable to `mean`: the entries that there are, in states of several sizes. The others stay at the mean,
        and contribute nothing to log-probabilities, KL and entropy. None for all.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> p = rgdiff.kernels.Gaussian(jnp.zeros((1, 2)), jnp.float32(1.0))
      >>> q = rgdiff.kernels.Gaussian(jnp.ones((1, 2)), jnp.float32(1.0))
      >>> print(p.kl(q))  # |0 - 1|^2 / 2 over two coordinates
      [1.]
    """

    mean: Array
    std: Array
    where: Array | None = None

    def within(self, where: Array) -> Gaussian:
        """Return the law of a state that has these entries alone: the others are 0."""
        return Gaussian(jnp.where(where, self.mean, 0.0), self.std, where)

    def _sum(self, per_coordinate: Array) -> Array:
        if self.where is not None:
            per_coordinate = jnp.where(self.where, per_coordinate, 0.0)
        return _total(per_coordinate)

    def sample(self, key: Key) -> Array:
        return jax.lax.stop_gradient(self.rsample(key))

    def rsample(self, key: Key) -> Array:
        draw = self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return draw if self.where is None else jnp.where(self.where, draw, self.mean)

    def log_prob(self, x: Array) -> Array:
        z = (x - self.mean) / self.std
        return -self._sum(0.5 * z**2 + jnp.log(self.std) + 0.5 * jnp.log(2 * jnp.pi))

    def kl(self, other: Gaussian) -> Array:
        """Return the KL [B] in nats; both must have the same entries."""
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return self._sum(0.5 * (ratio**2 + shift**2 - 1) - jnp.log(ratio))

    def entropy(self) -> Array:
        per_coordinate = 0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(self.std)
        return self._sum(jnp.broadcast_to(per_coordinate, self.mean.shape))

    def tilt(self, direction: Array) -> Gaussian:
        """Return p(x) exp<direction, x>, renormalised: the mean is shifted by std^2 times the direction [B, ...]."""
        if self.where is not None:
            direction = jnp.where(self.where, direction, 0.0)
        return Gaussian((self.mean + self.std**2 * direction).astype(self.mean.dtype), self.std, self.where)


class _NoDensity:
    """What has no density says so."""

    what: ClassVar[str]
    advice: ClassVar[str] = ""

    def log_prob(self, x: State) -> Array:
        raise ValueError(f"{self.what} has no log_prob{self.advice}")

    def kl(self, other: object) -> Array:
        raise ValueError(f"{self.what} has no KL{self.advice}")

    def entropy(self) -> Array:
        raise ValueError(f"{self.what} has no entropy{self.advice}")

    def tilt(self, direction: State) -> Any:
        raise ValueError(f"{self.what} cannot be tilted{self.advice}")


@pytree
class PointMass(_NoDensity):
    """A distribution on one point: a deterministic step (eta = 0) or a fixed prior. It can be drawn from and has no density.

    Args:
      point: the state, a pytree of leaves [B, ...].

    Raises:
      ValueError: from `log_prob`, `kl`, `entropy` and `tilt`.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> print(rgdiff.kernels.PointMass(jnp.ones((1, 2))).sample(jax.random.key(0)))
      [[1. 1.]]
    """

    what = "a point mass"
    advice = "; build the process with eta > 0"

    point: State

    def within(self, where: Array) -> PointMass:
        """Return the law of a state [B, ...] that has these entries alone: the others are 0."""
        return PointMass(jnp.where(where, self.point, 0.0))

    def sample(self, key: Key) -> State:
        return jax.lax.stop_gradient(self.point)

    def rsample(self, key: Key) -> State:
        return self.point


@pytree
class Fixed:
    """What a state carries along unchanged, such as the mask of a graph's atoms: every quantity of it is 0, and a tilt leaves it.

    It is no step with eta = 0 (`PointMass`), which has no density: here both laws of a KL carry the same thing.

    Args:
      point: [B, ...].

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> mask = rgdiff.kernels.Fixed(jnp.array([[1.0, 1.0, 0.0]]))
      >>> print(mask.log_prob(jnp.array([[1.0, 1.0, 0.0]])), mask.log_prob(jnp.ones((1, 3))))
      [0.] [-inf]
    """

    point: Array

    def sample(self, key: Key) -> Array:
        return jax.lax.stop_gradient(self.point)

    def rsample(self, key: Key) -> Array:
        return self.point

    def log_prob(self, x: Array) -> Array:
        return jnp.where((x == self.point).reshape(x.shape[0], -1).all(-1), 0.0, -jnp.inf)

    def kl(self, other: Fixed) -> Array:
        return jnp.zeros(self.point.shape[0], jnp.float32)

    def entropy(self) -> Array:
        return jnp.zeros(self.point.shape[0], jnp.float32)

    def tilt(self, direction: Array) -> Fixed:
        return self


@pytree
class Drawn(_NoDensity):
    """The distribution of another chain's samples. It can be drawn from; its density is not known.

    Args:
      draw: (key, batch) -> state, a pytree of leaves [B, ...].
      batch: B, number of examples of a draw.

    Raises:
      ValueError: from `log_prob`, `kl`, `entropy` and `tilt`.

    Example:
      >>> import jax, rgdiff
      >>> uniform = rgdiff.kernels.Drawn(lambda key, batch: jax.random.uniform(key, (batch, 2)), 3)
      >>> uniform.sample(jax.random.key(0)).shape
      (3, 2)
    """

    what = "the law of another chain's samples"

    draw: Callable[..., Any]
    batch: int = static()

    def sample(self, key: Key) -> State:
        return jax.lax.stop_gradient(self.draw(key, self.batch))

    def rsample(self, key: Key) -> State:
        return self.draw(key, self.batch)


def draw_token(key: Key, logits: Array, relaxation: str, gumbel_temperature: Array | float) -> Array:
    """Draw one-hot tokens whose value or gradient is relaxed.

    Args:
      key: a typed PRNG key.
      logits: [..., K], unnormalised log-probabilities; -inf is allowed.
      relaxation: one of

        straight_through: hard value, gradient of softmax(logits). Unbiased for functions that are multilinear in the tokens.
        gumbel: hard value, gradient of softmax((logits + Gumbel) / gumbel_temperature) with the same noise (arXiv 1611.01144).
        reinmax: hard value, second-order gradient (arXiv 2304.08612).
        relaxed: the Gumbel-softmax point itself, in the interior of the simplex.
      gumbel_temperature: of `gumbel` and `relaxed`, positive, without unit; the others do not read it.

    Returns:
      Tokens [..., K]: one-hot, but for `relaxed`.

    Raises:
      ValueError: for an unknown relaxation.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> logits = jnp.log(jnp.array([0.25, 0.75]))
      >>> first = lambda logits: rgdiff.kernels.draw_token(jax.random.key(0), logits, "straight_through", 1.0)[0]
      >>> [round(float(g), 4) for g in jax.grad(first)(logits)]  # of softmax: p_0 (1 - p_0), -p_0 p_1
      [0.1875, -0.1875]
    """
    checks.one_of("relaxation", relaxation, RELAXATIONS)
    log_p = jax.nn.log_softmax(logits)
    noisy = log_p + jax.random.gumbel(key, log_p.shape, log_p.dtype)
    hard = jax.nn.one_hot(jnp.argmax(noisy, -1), log_p.shape[-1], dtype=log_p.dtype)
    if relaxation == "relaxed":
        return jax.nn.softmax(noisy / gumbel_temperature)
    if relaxation == "straight_through":
        soft = jnp.exp(log_p)
    elif relaxation == "gumbel":
        soft = jax.nn.softmax(noisy / gumbel_temperature)
    else:
        p = jnp.exp(log_p)
        shift = jnp.where(hard + p > 0, jnp.log((hard + p) / 2) - log_p, 0.0)
        middle = jax.nn.softmax(jax.lax.stop_gradient(shift) + log_p)
        soft = 2 * middle - p / 2
    return jax.lax.stop_gradient(hard - soft) + soft


def _cross(p: Array, log_q: Array) -> Array:
    """sum_k p_k log q_k with 0 log 0 = 0, safe under differentiation: [..., K] -> [...]."""
    return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, log_q, 0.0), 0.0), -1)


@pytree
class Categorical:
    """Independent categorical distributions of one-hot tokens.

    Args:
      logits: [B, ..., K], unnormalised log-probabilities; -inf is allowed.
      gumbel_temperature: of the relaxations `gumbel` and `relaxed`, positive, without unit.
      relaxation: the gradient that `rsample` passes back (see `draw_token`).

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> p = rgdiff.kernels.Categorical(jnp.log(jnp.array([[0.25, 0.75]])))
      >>> print(jnp.exp(p.log_prob(jnp.array([[0.0, 1.0]]))))
      [0.75]
      >>> print(jnp.exp(p.tilt(jnp.log(jnp.array([[3.0, 1.0]]))).log_p))
      [[0.5 0.5]]
    """

    logits: Array
    gumbel_temperature: Array | float = 1.0
    relaxation: str = static(default="straight_through")

    @property
    def log_p(self) -> Array:
        return jax.nn.log_softmax(self.logits)

    def sample(self, key: Key) -> Array:
        token = jax.random.categorical(key, self.logits)
        return jax.nn.one_hot(token, self.logits.shape[-1], dtype=self.logits.dtype)

    def rsample(self, key: Key) -> Array:
        return draw_token(key, self.logits, self.relaxation, self.gumbel_temperature)

    def log_prob(self, x: Array) -> Array:
        return _total(_cross(x, self.log_p))

    def kl(self, other: Categorical) -> Array:
        p = jnp.exp(self.log_p)
        return _total(_cross(p, self.log_p) - _cross(p, other.log_p))

    def entropy(self) -> Array:
        return -_total(_cross(jnp.exp(self.log_p), self.log_p))

    def tilt(self, direction: Array) -> Categorical:
        """Return p(x) exp<direction, x>, renormalised: the direction [B, ..., K] is added to the logits."""
        return Categorical(self.logits + direction, self.gumbel_temperature, self.relaxation)


@pytree
class Absorbing:
    """The reverse kernel of masked diffusion: each masked position is unmasked with probability exp(log_move), independently.

    Unmasked positions are copied. The copies are not part of the draw, so that their gradient is passed on in full (one
    categorical with deltas on unmasked tokens is the same distribution, and passes 1/T of the gradient). The positions that
    are unmasked are drawn exactly and carry no gradient; the token alone is relaxed.

    Args:
      x: the state, one-hot [B, ..., K + 1] with the mask last.
      logits: [B, ..., K], of the token given that the position is unmasked.
      log_move, log_stay: log-probabilities of being unmasked and of staying masked, broadcastable to [B, ...].
      gumbel_temperature, relaxation: of the token (see `draw_token`).

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> masked, token = jnp.array([[[0.0, 0.0, 1.0]]]), jnp.array([[[1.0, 0.0, 0.0]]])
      >>> kernel = rgdiff.kernels.Absorbing(masked, jnp.zeros((1, 1, 2)), jnp.log(0.5), jnp.log(0.5))
      >>> print(jnp.exp(kernel.log_prob(masked)), jnp.exp(kernel.log_prob(token)))
      [0.5] [0.25]
    """

    x: Array
    logits: Array
    log_move: Array
    log_stay: Array
    gumbel_temperature: Array | float = 1.0
    relaxation: str = static(default="straight_through")

    @property
    def log_p(self) -> Array:
        return jax.nn.log_softmax(self.logits)

    @property
    def masked(self) -> Array:
        return self.x[..., -1] > 0.5

    def sample(self, key: Key) -> Array:
        key_event, key_token = jax.random.split(key)
        token = jax.random.categorical(key_token, self.logits)
        return self._place(key_event, jax.nn.one_hot(token, self.x.shape[-1], dtype=self.x.dtype))

    def rsample(self, key: Key) -> Array:
        key_event, key_token = jax.random.split(key)
        token = draw_token(key_token, self.logits, self.relaxation, self.gumbel_temperature)
        return self._place(key_event, jnp.concatenate([token, jnp.zeros_like(token[..., :1])], -1))

    def _place(self, key: Key, token: Array) -> Array:
        event = jnp.log(jax.random.uniform(key, self.masked.shape)) < self.log_move
        return jnp.where((self.masked & event)[..., None], token.astype(self.x.dtype), self.x)

    def log_prob(self, x: Array) -> Array:
        """Return the log-probability [B] of a one-hot state [B, ..., K + 1]; -inf where an unmasked position differs."""
        stays = x[..., -1] > 0.5
        token = self.log_move + _cross(x[..., :-1], self.log_p)
        copied = jnp.where(jnp.all(x == self.x, -1), 0.0, -jnp.inf)
        return _total(jnp.where(self.masked, jnp.where(stays, self.log_stay, token), copied))

    def kl(self, other: Absorbing) -> Array:
        """Return the KL [B] in nats: over masked positions, the KL of unmasking, and the token's weighted by the probability of unmasking."""
        move, stay = jnp.exp(self.log_move), jnp.exp(self.log_stay)
        p = jnp.exp(self.log_p)
        token = _cross(p, self.log_p) - _cross(p, other.log_p)
        event = _expected(move, self.log_move, other.log_move) + _expected(stay, self.log_stay, other.log_stay)
        return _total(jnp.where(self.masked, move * token + event, 0.0))

    def entropy(self) -> Array:
        move, stay = jnp.exp(self.log_move), jnp.exp(self.log_stay)
        token = -_cross(jnp.exp(self.log_p), self.log_p)
        event = -_expected(move, self.log_move, 0.0) - _expected(stay, self.log_stay, 0.0)
        return _total(jnp.where(self.masked, move * token + event, 0.0))

    def tilt(self, direction: Array) -> Absorbing:
        """Return p(x) exp<direction, x>, renormalised, for a direction [B, ..., K + 1]: it tilts the token *and* the rate of unmasking."""
        tilted = self.log_p + direction[..., :-1]
        move = self.log_move + jax.nn.logsumexp(tilted, -1)
        stay = self.log_stay + direction[..., -1]
        total = jnp.logaddexp(move, stay)
        return Absorbing(self.x, tilted, move - total, stay - total, self.gumbel_temperature, self.relaxation)

    def tilt_token(self, direction: Array) -> Absorbing:
        """Tilt the token alone by a direction [B, ..., K]; the rate of unmasking is not changed."""
        return Absorbing(
            self.x, self.logits + direction, self.log_move, self.log_stay, self.gumbel_temperature, self.relaxation
        )


@pytree
class FirstHitting:
    """The kernel of one event of masked diffusion: one masked position, drawn uniformly, is unmasked.

    L such events have the same distribution as an `Absorbing` chain of infinitely many moves, without discretisation error
    (arXiv 2409.02908). The position is drawn exactly and carries no gradient; the token alone is relaxed. A state without a
    masked position is copied.

    Args:
      x: the state, one-hot [B, ..., K + 1] with the mask last.
      logits: [B, ..., K], of the token given that the position is unmasked.
      log_where: [B, ...], unnormalised log-probability that a masked position is the one unmasked; 0 is uniform.
      gumbel_temperature, relaxation: of the token (see `draw_token`).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> x = jax.nn.one_hot(jnp.array([[2, 0, 2]]), 3)  # masked, token 0, masked
      >>> print(jnp.exp(rgdiff.kernels.FirstHitting(x, jnp.zeros((1, 3, 2))).log_position))
      [[0.5 0.  0.5]]
    """

    x: Array
    logits: Array
    log_where: Array | float = 0.0
    gumbel_temperature: Array | float = 1.0
    relaxation: str = static(default="straight_through")

    @property
    def log_p(self) -> Array:
        return jax.nn.log_softmax(self.logits)

    @property
    def masked(self) -> Array:
        return self.x[..., -1] > 0.5

    @property
    def log_position(self) -> Array:
        """Log-probability of each position to be the one unmasked, -inf where it is not masked: [B, ...]."""
        masked = self.masked
        scores = jnp.where(masked, self.log_where, -jnp.inf).reshape(masked.shape[0], -1)
        some = masked.reshape(masked.shape[0], -1).any(-1, keepdims=True)
        total = jax.nn.logsumexp(jnp.where(some, scores, 0.0), -1, keepdims=True)
        return jnp.where(some, scores - total, -jnp.inf).reshape(masked.shape)

    def sample(self, key: Key) -> Array:
        key_where, key_token = jax.random.split(key)
        token = jax.random.categorical(key_token, self.logits)
        return self._place(key_where, jax.nn.one_hot(token, self.x.shape[-1], dtype=self.x.dtype))

    def rsample(self, key: Key) -> Array:
        key_where, key_token = jax.random.split(key)
        token = draw_token(key_token, self.logits, self.relaxation, self.gumbel_temperature)
        return self._place(key_where, jnp.concatenate([token, jnp.zeros_like(token[..., :1])], -1))

    def _place(self, key: Key, token: Array) -> Array:
        scores = self.log_position + jax.random.gumbel(key, self.masked.shape)
        flat = jax.lax.stop_gradient(scores).reshape(scores.shape[0], -1)
        chosen = jax.nn.one_hot(jnp.argmax(flat, -1), flat.shape[-1], dtype=bool).reshape(scores.shape)
        return jnp.where((self.masked & chosen)[..., None], token.astype(self.x.dtype), self.x)

    def log_prob(self, x: Array) -> Array:
        """Return the log-probability [B] of a one-hot state [B, ..., K + 1]; -inf unless exactly one masked position took a token."""
        moved = jnp.any(x != self.x, -1) & self.masked
        taken = jnp.where(moved, self.log_position + _cross(x[..., :-1], self.log_p), 0.0)
        flat = lambda a: a.reshape(a.shape[0], -1)  # noqa: E731
        count = flat(moved).sum(-1)
        expected = jnp.minimum(flat(self.masked).sum(-1), 1)
        copied = flat(moved | jnp.all(x == self.x, -1)).all(-1)
        return jnp.where((count == expected) & copied, _total(taken), -jnp.inf)

    def kl(self, other: FirstHitting) -> Array:
        """Return the KL [B] in nats: the KL of the positions, and the token's averaged over the position that is unmasked."""
        where = jnp.exp(self.log_position)
        p = jnp.exp(self.log_p)
        token = _cross(p, self.log_p) - _cross(p, other.log_p)
        return _total(
            jnp.where(self.masked, where * token, 0.0) + _expected(where, self.log_position, other.log_position)
        )

    def entropy(self) -> Array:
        where = jnp.exp(self.log_position)
        token = -_cross(jnp.exp(self.log_p), self.log_p)
        return _total(jnp.where(self.masked, where * token, 0.0) - _expected(where, self.log_position, 0.0))

    def tilt(self, direction: Array) -> FirstHitting:
        """Return p(x) exp<direction, x>, renormalised, for a direction [B, ..., K + 1]: it tilts the token *and* the position."""
        tilted = self.log_p + direction[..., :-1]
        where = self.log_where + jax.nn.logsumexp(tilted, -1) - direction[..., -1]
        return FirstHitting(self.x, tilted, where, self.gumbel_temperature, self.relaxation)

    def tilt_token(self, direction: Array) -> FirstHitting:
        """Tilt the token alone by a direction [B, ..., K]; the probabilities of the positions are not changed."""
        return FirstHitting(self.x, self.logits + direction, self.log_where, self.gumbel_temperature, self.relaxation)


def _expected(probability: Array, log_p: Array, log_q: Array | float) -> Array:
    """probability * (log_p - log_q), zero where the probability is."""
    some = probability > 0
    return jnp.where(some, probability * (jnp.where(some, log_p, 0.0) - jnp.where(some, log_q, 0.0)), 0.0)


@pytree
class Product:
    """Independent kernels of a mixed state, one per name; states and directions are dicts with the same names.

    Args:
      parts: dict of name -> kernel, each with leading axis B.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> normal = rgdiff.kernels.Gaussian(jnp.zeros((1, 2)), jnp.float32(1.0))
      >>> coin = rgdiff.kernels.Categorical(jnp.zeros((1, 3, 2)))
      >>> both = rgdiff.kernels.Product({"x": normal, "tokens": coin})
      >>> print(bool(jnp.isclose(both.entropy()[0], jnp.log(2 * jnp.pi * jnp.e) + 3 * jnp.log(2.0))))
      True
    """

    parts: dict[str, Gaussian | Categorical | Absorbing | FirstHitting | Fixed | PointMass | Product]

    def _keys(self, key: Key) -> dict[str, Key]:
        names = sorted(self.parts)
        return dict(zip(names, jax.random.split(key, len(names)), strict=True))

    def sample(self, key: Key) -> State:
        keys = self._keys(key)
        return {name: part.sample(keys[name]) for name, part in self.parts.items()}

    def rsample(self, key: Key) -> State:
        keys = self._keys(key)
        return {name: part.rsample(keys[name]) for name, part in self.parts.items()}

    def log_prob(self, x: State) -> Array:
        return sum((part.log_prob(x[name]) for name, part in self.parts.items()), start=jnp.float32(0))

    def kl(self, other: Product) -> Array:
        return sum((part.kl(other.parts[name]) for name, part in self.parts.items()), start=jnp.float32(0))  # type: ignore[arg-type]

    def entropy(self) -> Array:
        return sum((part.entropy() for part in self.parts.values()), start=jnp.float32(0))

    def tilt(self, direction: State) -> Product:
        return Product({name: part.tilt(direction[name]) for name, part in self.parts.items()})
