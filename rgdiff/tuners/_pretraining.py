"""Pre-training on data: denoising losses for Gaussian processes, the SUBS bound for masked ones.

Both noise a batch to stratified times and average a weighted error; they differ in the error. The averaged (EMA)
weights, `state.best`, are the ones to sample with. `masked_bound` measures a masked prior in nats without any bias.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.denoisers import needs_signal
from rgdiff.processes import GaussianProcess, MaskedProcess
from rgdiff.shards import Shards, bound, value_and_grad
from rgdiff.tuners._loop import TrainState, start, update
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Info,
    Key,
    Model,
    Params,
    Process,
    State,
    callable_pytree,
    pytree,
    static,
)

EARLIEST = 1e-3  # losses are taken over t in [EARLIEST, latest]: weights such as 1/t diverge at 0


def stratified_times(key: Key, batch: int, earliest: float = EARLIEST, latest: float = 1.0) -> Array:
    """Draw times [B], one in each of B equal strata in random order: antithetic, each marginally uniform."""
    key_offset, key_order = jax.random.split(key)
    strata = (jax.random.permutation(key_order, batch) + jax.random.uniform(key_offset)) / batch
    return earliest + (latest - earliest) * strata


@pytree
class Pretraining:
    """Fits a denoiser to data. Build it with `pretraining`."""

    model: Model
    process: Process
    ema_decay: Array
    gamma: Array
    drop: Array
    null: Any
    grid: Array | None
    optimizer: Any = static()
    target: str = static(default="eps")
    weighting: str = static(default="uniform")
    shards: Shards | None = static(default=None)

    def init(self, params: Params) -> TrainState:
        if self.grid is not None:
            needs_signal(self.model, self.grid, params)
        return start(params, self.optimizer, average=True)

    def suits(self, data: Any) -> None:
        """Refuse data that are not examples of the process."""
        checks.entries(data, "x0")
        checks.examples("data['x0']", data["x0"], self.process)

    def step(self, key: Key, state: TrainState, batch: Any) -> tuple[TrainState, Info]:
        """Take one step on batch = {"x0": [B, ...]} and, optionally, "cond"."""
        grad = value_and_grad(self.loss, self.shards)
        loss, gradients = grad(state.params, key, batch["x0"], batch.get("cond"))
        state, info = update(state, gradients, self.optimizer, self.ema_decay)
        return state, {"loss": loss} | info

    def loss(self, params: Params, key: Key, x0: State, cond: Cond = None, weights: Array | None = None) -> Array:
        """The training loss: a weighted squared error per dimension, or the bound on -log p(x0) in nats per example.

        The mean over examples, or their sum with `weights` [B].
        """
        key_time, key_noise, key_drop = jax.random.split(key, 3)
        batch = x0.shape[0]
        if cond is not None and self.null is not None:
            dropped = jax.random.bernoulli(key_drop, self.drop, (batch,))
            hide = lambda c, n: jnp.where(dropped.reshape(-1, *([1] * (c.ndim - 1))), jnp.asarray(n, c.dtype), c)  # noqa: E731
            cond = jax.tree.map(hide, cond, self.null)
        denoiser = bound(self.model, params, "a denoiser")
        if isinstance(self.process, MaskedProcess):
            t = stratified_times(key_time, batch)
            x = self.process.forward(x0, t).sample(key_noise)
            error = self.process.schedule.hazard(t) * masked_cross_entropy(denoiser(x, t, cond), x, x0)
            return jnp.mean(error) if weights is None else jnp.sum(weights * error)
        process: GaussianProcess = self.process  # type: ignore[assignment]
        t = self._draw_times(key_time, batch)
        x = process.forward(x0, t).sample(key_noise)
        error = jnp.mean((checks.prediction(denoiser(x, t, cond), x) - x0).reshape(batch, -1) ** 2, -1)
        error = self._weight(process, t) * error
        return jnp.mean(error) if weights is None else jnp.sum(weights * error)

    def _draw_times(self, key: Key, batch: int) -> Array:
        if self.grid is None:
            return stratified_times(key, batch, latest=0.992 if self.target == "eps" else 1.0)
        count = self.grid.shape[0]
        index = stratified_times(key, batch, 0.0, count).astype(jnp.int32)
        return self.grid[jnp.minimum(index, count - 1)]

    def _weight(self, process: GaussianProcess, t: Array) -> Array:
        """Weight of the squared error of x0 that makes it the squared error of the target (min-SNR: min(SNR, gamma))."""
        snr = jnp.exp(process.schedule.log_snr(t))
        if self.weighting == "min_snr":
            return jnp.minimum(snr, self.gamma)
        if self.target == "x0":
            return jnp.ones_like(t)
        if self.target == "eps":
            return snr
        total = process.schedule.alpha(t) ** 2 + process.schedule.sigma(t) ** 2
        return total**2 / process.schedule.sigma(t) ** 2


def pretraining(
    model: Model,
    process: Process,
    optimizer: Any,
    *,
    target: str = "eps",
    weighting: str = "uniform",
    gamma: float = 5.0,
    ema_decay: float = 0.999,
    drop: float = 0.1,
    null: Any = None,
    grid: int | None = None,
) -> Pretraining:
    """Train a prior: minimise E weight(t) |target - prediction|^2, or the continuous-time bound of masked diffusion.

    The minimiser is E[x0 | x_t], or the logits of p(x0 | x_t), of the data. Data come through
    `fit(data={"x0": [N, ...]}, batch=...)`, with "cond" [N, ...] where there are conditions.

    Args:
      model: params -> denoiser, (x [B, ...], t [B], cond) -> E[x0 | x_t] (whatever its network predicts), or logits for a masked
        process.
      process: Gaussian or masked.
      optimizer: an optax gradient transformation.
      target: `eps`, `x0` or `v`: whose squared error is minimised. The error of x0 is reweighted, which is the same
        number; the prediction of the *network* is chosen in the model (`denoisers.predicts`).
      weighting: `uniform` over t, or `min_snr`: the x0 error weighted by min(SNR, gamma) (arXiv 2303.09556).
      gamma: bound on the weight of `min_snr`.
      ema_decay: of the averaged weights, `state.best`.
      drop, null: with conditions, replace them by `null`, a pytree like one row of them, with probability `drop` (classifier-free
        guidance); None never replaces.
      grid: draw times from `process.times(grid)`, each as often, as discrete DDPM does; None for all times from 1e-3.
        For a Gaussian process.

    Returns:
      A tuner for `fit(data=...)`; sample with `model(state.best)`. info: loss, gradient_norm, skipped. `tuner.loss(params, key, x0)`
      measures held-out data.

    Raises:
      ValueError: for another process than a Gaussian or masked one, unknown names, numbers out of range.

    Note:
      The masked loss is SUBS (arXiv 2406.07524, eq. 10): E_t rate'(t)/rate(t) * sum over masked positions of
      -log p(x0 | x_t), in nats per example, with t from 1e-3.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> model = lambda w: lambda x, t, cond=None: w + 0 * x  # a network in practice
      >>> tuner = rgdiff.tuners.pretraining(model, process, optax.sgd(0.5), target="x0")
      >>> data = {"x0": jnp.full((8, 1), 3.0)}
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2, data=data, batch=4)
      >>> print(state.params)
      [3.]
    """
    if not isinstance(process, (GaussianProcess, MaskedProcess)):
        raise ValueError(f"pretraining knows gaussian and masked processes, got {type(process).__name__}")
    return Pretraining(
        model=callable_pytree(model, "model (params -> denoiser)"),
        process=process,
        ema_decay=checks.positive("ema_decay", ema_decay, zero=True),
        gamma=checks.positive("gamma", gamma),
        drop=checks.positive("drop", drop, zero=True),
        null=null,
        grid=None if grid is None else process.times(checks.at_least("grid", grid, 1)),
        optimizer=checks.optimizer(optimizer),
        target=checks.one_of("target", target, ("eps", "x0", "v")),
        weighting=checks.one_of("weighting", weighting, ("uniform", "min_snr")),
    )


def masked_cross_entropy(logits: Array, x: Array, x0: Array) -> Array:
    """Sum over masked positions of -log p(x0 | x_t), nats [B]."""
    log_p = jax.nn.log_softmax(checks.logits(logits, x))
    per_position = -jnp.sum(jnp.where(x0 > 0, log_p, 0.0) * x0, -1)
    return jnp.sum((x[..., -1] * per_position).reshape(x.shape[0], -1), -1)


def masked_bound(key: Key, process: MaskedProcess, denoiser: Denoiser, x0: Array, cond: Cond = None) -> Array:
    """Estimate the variational bound on -log p(x0), nats per example [B], without discretisation error.

        bound = sum over m = 1..L of (1/m) E[sum over m random masked positions of -log p(x0 | x)]

    The continuous-time bound equals this whatever the schedule, so one random mask of every size gives an unbiased estimate in L
    network calls. For a denoiser that ignores t and is any-order consistent, the bound is tight.

    Args:
      key: a typed PRNG key, of the masks.
      process: from `processes.masked`, L positions of K classes.
      denoiser: (x [B, L, K + 1], t, cond) -> logits [B, L, K]; t is the time at which m of L positions are masked on average.
      x0: one-hot examples [B, L, K].
      cond: conditions [B, ...], or None.

    Returns:
      Estimates [B], nats.

    Raises:
      ValueError: for a process that is not masked, or a key that is not typed.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), (3,), 4)
      >>> x0 = jax.nn.one_hot(jnp.array([[0, 1, 3]]), 4)
      >>> uniform = lambda x, t, cond=None: jnp.zeros((1, 3, 4))
      >>> print(f"{rgdiff.tuners.masked_bound(jax.random.key(0), process, uniform, x0)[0]:.3f}")  # 3 log 4
      4.159
    """
    checks.key(key)
    if not isinstance(process, MaskedProcess):
        raise ValueError(f"masked_bound needs a masked process, got {type(process).__name__}")
    checks.examples("x0", x0, process)
    positions = 1
    for size in process.shape:
        positions *= size
    grid = jnp.linspace(0.0, 1.0, 4097)
    times = jnp.interp(jnp.arange(1, positions + 1) / positions, process.schedule.rate(grid), grid)
    mask = jax.nn.one_hot(process.classes, process.classes + 1, dtype=jnp.float32)
    extended = jnp.concatenate([x0, jnp.zeros_like(x0[..., :1])], -1)

    def with_masks(m: Array) -> Array:
        scores = jax.random.uniform(jax.random.fold_in(key, m), (x0.shape[0], positions))
        masked = (jnp.argsort(jnp.argsort(scores, -1), -1) < m).reshape(x0.shape[:-1])
        x = jnp.where(masked[..., None], mask, extended)
        return masked_cross_entropy(denoiser(x, times[m - 1], cond), x, x0) / m

    return jnp.sum(jax.lax.map(with_masks, jnp.arange(1, positions + 1)), 0)
