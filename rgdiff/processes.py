"""Noising processes: a schedule becomes kernels. `gaussian`, `masked`, `first_hitting` and `product` build them.

A process turns a network's prediction (E[x0 | x_t], or logits of p(x0 | x_t)) into the reverse kernel p(x_s | x_t). It
holds the prior, the forward kernel and the time grid of a chain. Gaussian chains end at a small t > 0 and are projected
to data by `mean`; masked chains run to t = 0, where the last kernel unmasks everything.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rgdiff import checks
from rgdiff.kernels import RELAXATIONS, Absorbing, Categorical, Drawn, FirstHitting, Gaussian, PointMass, Product
from rgdiff.schedules import GaussianSchedule, MaskSchedule
from rgdiff.typing import Array, Process, State, callable_pytree, pytree, static


def along(t: Array | float, x: Array) -> Array:
    """Return times or coefficients with the rank of the state, so that they multiply it.

    Args:
      t: [] or [B].
      x: the state [B, ...].

    Returns:
      t as [] or [B, 1, ..., 1].
    """
    t = jnp.asarray(t, jnp.float32)
    return t if t.ndim == 0 else t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


@pytree
class GaussianProcess:
    """x_t = alpha_t x0 + sigma_t eps, with DDIM's family of reverse kernels. Build it with `gaussian`."""

    schedule: GaussianSchedule
    eta: Array
    shape: tuple[int, ...] = static()
    stochastic: bool = static(default=True)
    initial: Any = None
    variance: str = static(default="fixed_small")
    clip: Array | None = None
    end: Array | None = None

    @property
    def projects(self) -> bool:
        return True

    def times(self, steps: int) -> Array:
        """Return the grid of `steps` network calls: steps - 1 moves and the projection. [steps]"""
        return self.schedule.times(steps)

    def prior(self, batch: int) -> Gaussian | Drawn:
        if self.initial is not None:
            return Drawn(self.initial, batch)
        return Gaussian(jnp.zeros((batch, *self.shape), jnp.float32), self.schedule.prior_std)

    def forward(self, x0: Array, t: Array) -> Gaussian:
        return Gaussian(along(self.schedule.alpha(t), x0) * x0, along(self.schedule.sigma(t), x0))

    def renoise(self, x: Array, s: Array, t: Array) -> Gaussian:
        """Return p(x_t | x_s), s < t, the forward kernel between two times: mean (alpha_t / alpha_s) x_s."""
        std = self.schedule.sigma(t) * self._shrink(t, s)
        return Gaussian(along(self.schedule.alpha(t) / self.schedule.alpha(s), x) * x, along(std, x))

    def _shrink(self, t: Array, s: Array) -> Array:
        """Standard deviation of x_s given x_t and x0 over sigma_s, which is that of x_t given x_s over sigma_t."""
        return jnp.sqrt(-jnp.expm1(self.schedule.log_snr(t) - self.schedule.log_snr(s)))

    def eps(self, x: Array, t: Array, prediction: Array) -> Array:
        """Return the noise [B, ...] implied by x_t and a prediction of x0."""
        prediction = checks.prediction(prediction, x)
        return (x - along(self.schedule.alpha(t), x) * prediction) / along(self.schedule.sigma(t), x)

    def score(self, x: Array, t: Array, prediction: Array) -> Array:
        """Return the gradient of log p(x_t) [B, ...] implied by a prediction of x0: -eps / sigma."""
        return -self.eps(x, t, prediction) / along(self.schedule.sigma(t), x)

    def noise(self, x: Array) -> Gaussian:
        """Return standard normal noise of the state's form."""
        return Gaussian(jnp.zeros(x.shape, jnp.float32), jnp.float32(1))

    def reverse(self, x: Array, t: Array, s: Array, prediction: Array) -> Gaussian | PointMass:
        """p(x_s | x_t): mean alpha_s x0 + sqrt(sigma_s^2 - std^2) eps, std = min(eta * posterior std, sigma_s).

        eta = 1 is the exact posterior q(x_s | x_t, x0) (ancestral DDPM, EDM's ancestral step, the flow SDE); every
        eta keeps the marginals of an exact denoiser as steps shrink (arXiv 2010.02502 eq. 12, for any alpha, sigma).
        With variance `fixed_large` std is that of x_t given x_s; with `clip` x0 is clipped, and eps is not.
        """
        prediction = checks.prediction(prediction, x)
        alpha_s, sigma_s = self.schedule.alpha(s), self.schedule.sigma(s)
        eps, prediction = self.eps(x, t, prediction), self._clipped(prediction)
        if not self.stochastic:
            return PointMass((along(alpha_s, x) * prediction + along(sigma_s, x) * eps).astype(x.dtype))
        shrink = self._shrink(t, s)
        fraction = jnp.minimum(self.eta * shrink, 1.0)
        mean = along(alpha_s, x) * prediction + along(sigma_s * jnp.sqrt(1 - fraction**2), x) * eps
        std = self.schedule.sigma(t) * shrink if self.variance == "fixed_large" else sigma_s * fraction
        return Gaussian(mean.astype(x.dtype), along(std, x))

    def _clipped(self, prediction: Array) -> Array:
        return prediction if self.clip is None else jnp.clip(prediction, self.clip[0], self.clip[1])

    def mean(self, x: Array, t: Array, prediction: Array) -> Array:
        return self._clipped(checks.prediction(prediction, x))

    def finalize(self, x: Array, t: Array, prediction: Array) -> Array:
        x0 = self.mean(x, t, prediction)
        if self.end is None:
            return x0
        eps = self.eps(x, t, prediction)
        return along(self.schedule.alpha(self.end), x) * x0 + along(self.schedule.sigma(self.end), x) * eps


@pytree
class InitialProcess(GaussianProcess):
    """Chains that draw x_T: under the exact denoiser of N(0, 1), standard normal at every step. Build it with `initial_law`.

    Moves have DDPM's larger variance, 1 - (alpha_t / alpha_s)^2: exact for standard normal data (arXiv 2006.11239, §3.2).
    """

    std: Array = 1.0  # type: ignore[assignment]

    @property
    def projects(self) -> bool:
        return False

    @property
    def ends_at_zero(self) -> bool:
        return False

    def times(self, steps: int) -> Array:
        """Return the grid of `steps` moves, one network call each; nothing is projected. [steps + 1]"""
        return self.schedule.times(checks.at_least("steps", steps, 1) + 1)

    def finalize(self, x: Array, t: Array, prediction: Array) -> Array:
        return self.std * x


@pytree
class MaskedProcess:
    """Absorbing-state diffusion of one-hot tokens (MDLM, SUBS parameterisation). Build it with `masked`."""

    schedule: MaskSchedule
    gumbel_temperature: Array
    shape: tuple[int, ...] = static()
    classes: int = static()
    relaxation: str = static(default="straight_through")

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def projects(self) -> bool:
        return False

    def times(self, steps: int) -> Array:
        """Return the grid of `steps` moves from 1 to 0, one network call each. [steps + 1]"""
        return jnp.linspace(1.0, 0.0, checks.at_least("steps", steps, 1) + 1)

    def prior(self, batch: int) -> PointMass:
        mask = jax.nn.one_hot(self.classes, self.classes + 1, dtype=jnp.float32)
        return PointMass(jnp.broadcast_to(mask, (batch, *self.shape, self.classes + 1)))

    def forward(self, x0: Array, t: Array) -> Categorical:
        """Return the distribution of x_t [B, ..., K + 1] given x0 one-hot [B, ..., K]: masked with probability rate(t)."""
        rate = along(self.schedule.rate(t), x0)
        mask = jnp.broadcast_to(rate, (*x0.shape[:-1], 1))
        p = jnp.concatenate([(1 - rate) * x0, mask], -1)
        return Categorical(jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf))  # no NaN gradient at p = 0

    def renoise(self, x: Array, s: Array, t: Array) -> Categorical:
        """Return p(x_t | x_s), s < t: an unmasked position is masked with probability (rate_t - rate_s) / (1 - rate_s)."""
        rate_t, rate_s = self.schedule.rate(t), self.schedule.rate(s)
        masks = along((rate_t - rate_s) / (1 - rate_s), x)
        mask = jax.nn.one_hot(self.classes, self.classes + 1, dtype=x.dtype)
        return Categorical(jnp.log((1 - masks) * x + masks * mask))

    def reverse(self, x: Array, t: Array, s: Array, prediction: Array) -> Absorbing:
        """Return p(x_s | x_t): a masked position is unmasked with probability (rate_t - rate_s) / rate_t (arXiv 2406.07524, eq. 7)."""
        rate_t, rate_s = self.schedule.rate(t), self.schedule.rate(s)
        positions = x[..., -1]
        log_move = along(jnp.log((rate_t - rate_s) / rate_t), positions)
        log_stay = along(jnp.log(rate_s / rate_t), positions)
        return Absorbing(x, checks.logits(prediction, x), log_move, log_stay, self.gumbel_temperature, self.relaxation)

    def mean(self, x: Array, t: Array, prediction: Array) -> Array:
        """Return E[x0 | x_t] [B, ..., K], a point of the simplex per position: the token, or softmax of the logits where masked."""
        return x[..., :-1] + x[..., -1:] * jax.nn.softmax(checks.logits(prediction, x)).astype(x.dtype)

    def finalize(self, x: Array, t: Array, prediction: Array) -> Array:
        """Drop the mask: at t = 0 no position is masked."""
        return x[..., :-1]


@pytree
class FirstHittingProcess(MaskedProcess):
    """Absorbing-state diffusion one event at a time: L moves, each unmasks one position. Build it with `first_hitting`."""

    @property
    def moves(self) -> int:
        """L, the number of moves after which no position is masked."""
        return math.prod(self.shape)

    def times(self, steps: int | None = None) -> Array:
        """Return the times at which L, L - 1, ..., 0 positions are masked on average. [L + 1]"""
        if steps is not None and steps != self.moves:
            raise ValueError(
                f"one event at a time takes exactly {self.moves} moves (positions), got {steps}; use times()"
            )
        grid = jnp.linspace(0.0, 1.0, 4097)
        return jnp.interp(jnp.linspace(1.0, 0.0, self.moves + 1), self.schedule.rate(grid), grid)

    def reverse(self, x: Array, t: Array, s: Array, prediction: Array) -> FirstHitting:  # type: ignore[override]
        """Return the distribution after the next event: a uniformly drawn masked position takes a token. t and s are not read."""
        return FirstHitting(x, checks.logits(prediction, x), 0.0, self.gumbel_temperature, self.relaxation)


@pytree
class ProductProcess:
    """Independent processes on a mixed state, one per name; one denoiser predicts all of them. Build it with `product`."""

    parts: dict[str, Any]

    @property
    def stochastic(self) -> bool:
        return all(part.stochastic for part in self.parts.values())

    @property
    def projects(self) -> bool:
        return any(part.projects for part in self.parts.values())

    def times(self, steps: int) -> Array:
        """Return a common grid. With a Gaussian part it ends at t > 0, and `finalize` takes the mode of what is still masked."""
        projecting = [part for part in self.parts.values() if part.projects]
        return (projecting or list(self.parts.values()))[0].times(steps)

    def prior(self, batch: int) -> Product:
        return Product({name: part.prior(batch) for name, part in self.parts.items()})

    def forward(self, x0: State, t: Array) -> Product:
        return Product({name: part.forward(x0[name], t) for name, part in self.parts.items()})

    def renoise(self, x: State, s: Array, t: Array) -> Product:
        return Product({name: part.renoise(x[name], s, t) for name, part in self.parts.items()})

    def score(self, x: State, t: Array, prediction: State) -> State:
        """Return the gradient of log p(x_t) implied by a prediction; every part must be Gaussian."""
        return {name: part.score(x[name], t, prediction[name]) for name, part in self.parts.items()}

    def noise(self, x: State) -> Product:
        """Return standard normal noise of the state's form; every part must be Gaussian."""
        return Product({name: part.noise(x[name]) for name, part in self.parts.items()})

    def reverse(self, x: State, t: Array, s: Array, prediction: State) -> Product:
        return Product({name: part.reverse(x[name], t, s, prediction[name]) for name, part in self.parts.items()})

    def mean(self, x: State, t: Array, prediction: State) -> State:
        return {name: part.mean(x[name], t, prediction[name]) for name, part in self.parts.items()}

    def finalize(self, x: State, t: Array, prediction: State) -> State:
        """Project every part; a position still masked takes its most probable token (none is where no part projects)."""
        if not self.projects:
            return {name: part.finalize(x[name], t, None) for name, part in self.parts.items()}
        out = {}
        for name, part in self.parts.items():
            if part.projects:
                out[name] = part.finalize(x[name], t, prediction[name])
            else:
                logits = checks.logits(prediction[name], x[name])
                mode = jax.nn.one_hot(jnp.argmax(logits, -1), part.classes, dtype=jnp.float32)
                out[name] = x[name][..., :-1] + x[name][..., -1:] * mode
        return out


VARIANCES = ("fixed_small", "fixed_large")


def gaussian(
    schedule: GaussianSchedule,
    shape: tuple[int, ...],
    *,
    eta: float = 1.0,
    variance: str = "fixed_small",
    clip: tuple[float, float] | None = None,
    end: float | None = None,
) -> GaussianProcess:
    """Build a Gaussian process x_t = alpha_t x0 + sigma_t eps on states [B, *shape].

    Args:
      schedule: alpha and sigma, from `rgdiff.schedules`.
      shape: of one example.
      eta: 1 is ancestral sampling, 0 is DDIM / the probability-flow ODE: its steps are points and can only be drawn
        from. A number, or a traced scalar (then taken as positive).
      variance: of a step with eta = 1. `fixed_small` is the variance of x_s given x_t and x0, exact for data at one point.
        `fixed_large` is the variance of x_t given x_s, 1 - (alpha_t / alpha_s)^2 in a variance-preserving schedule, exact for
        N(0, I) data (DDPM's two choices, arXiv 2006.11239, §3.2).
      clip: (low, high), in data units: predictions of x0 are clipped where they are used, and the direction eps stays the
        network's own, as in DDIM of released code (diffusers' `clip_sample`). `denoisers.clip_x0` clips before the step, so that
        eps follows the clipped x0, as in DDPM's.
      end: the time in (0, 1] at which chains end: the last network call moves by DDIM's step to it, and not to x0. Stable
        Diffusion's end at their first level, 1/1000 (diffusers' `set_alpha_to_one=False`). None ends at x0.

    Returns:
      The process.

    Raises:
      ValueError: for a process in place of the schedule, an unknown variance, `fixed_large` with another eta than 1, an empty
        range, or an end outside (0, 1].

    References: DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502, eq. 12).

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.flow(), (2,))
      >>> kernel = process.forward(jnp.ones((1, 2)), jnp.float32(0.25))
      >>> print(kernel.mean, kernel.std)
      [[0.75 0.75]] 0.25
    """
    value = checks.positive("eta", eta, zero=True)
    stochastic = isinstance(value, Tracer) or float(value) > 0
    checks.one_of("variance", variance, VARIANCES)
    if variance == "fixed_large" and (isinstance(value, Tracer) or float(value) != 1):
        raise ValueError(f"variance='fixed_large' is of ancestral steps, eta = 1, got eta = {eta!r}")
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        raise ValueError(f"clip is a range (low, high) of x0 with low < high, got {clip!r}")
    if end is not None and not 0 < end <= 1:
        raise ValueError(f"end is a time in (0, 1], got {end!r}; leave it out for chains that end at x0")
    return GaussianProcess(
        checks.schedule(schedule, "a Gaussian process"),
        value,
        tuple(int(d) for d in shape),
        stochastic,
        variance=variance,
        clip=None if clip is None else jnp.asarray(clip, jnp.float32),
        end=None if end is None else jnp.float32(end),
    )


def started_from(process: GaussianProcess, draw: Any) -> GaussianProcess:
    """Return the process whose chains begin at draws of a function instead of its prior (see `tuners.elegant`).

    Args:
      process: Gaussian.
      draw: (key, batch) -> x_T [B, *shape], in the unit of x at t = 1.

    Returns:
      A process with the same kernels and another prior, which has no density.

    Raises:
      ValueError: for a process that is not Gaussian.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> process = rgdiff.processes.started_from(process, lambda key, batch: jnp.full((batch, 2), 3.0))
      >>> print(process.prior(1).sample(jax.random.key(0)))
      [[3. 3.]]
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(
            f"started_from needs a Gaussian process, got {type(process).__name__}: masked chains begin at one point"
        )
    return dataclasses.replace(process, initial=callable_pytree(draw, "draw (key, batch) -> x_T"))


def initial_law(process: GaussianProcess, schedule: GaussianSchedule) -> InitialProcess:
    """Build the process of chains that draw x_T of another process; before tuning their moves leave N(0, std^2) unchanged.

    Args:
      process: Gaussian; its prior N(0, std^2) is the distribution to be tuned.
      schedule: of the moves, variance-preserving (alpha^2 + sigma^2 = 1); x_T is the chain's last state times std.
        Where alpha(1) is near 0 the chain's last state hardly depends on its first one, and its tuned distribution is near the
        tilted one (off by about 1/T of its T moves, whose variances are not tuned).

    Returns:
      The process; `times(T)` has T moves and no projection.

    Raises:
      ValueError: for a process that is not Gaussian, or one in place of the schedule.

    Example:
      >>> import jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.karras_ve(), (2,))
      >>> start = rgdiff.processes.initial_law(process, rgdiff.schedules.linear_vp())
      >>> print(start.finalize(jnp.ones((1, 2)), jnp.float32(0.0), None))  # std = 80
      [[80. 80.]]
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"initial_law needs a Gaussian process, got {type(process).__name__}")
    checks.schedule(schedule, "initial_law")
    return InitialProcess(
        schedule, jnp.float32(1.0), process.shape, variance="fixed_large", std=process.schedule.prior_std
    )


def masked(
    schedule: MaskSchedule,
    shape: tuple[int, ...] | int,
    classes: int,
    *,
    relaxation: str = "straight_through",
    gumbel_temperature: float = 1.0,
) -> MaskedProcess:
    """Build a masked process on one-hot states [B, *shape, classes + 1], the mask last; data are [B, *shape, classes].

    Its denoisers return logits [B, *shape, classes] of p(x0 | x_t), with none for the mask; a network of probabilities becomes
    one by `denoisers.predicts("probabilities", network)`.

    Args:
      schedule: the rate of masking, from `rgdiff.schedules`.
      shape: of the positions of one example (an int for a sequence's length).
      classes: K, the number of tokens without the mask.
      relaxation, gumbel_temperature: how a token's draw passes gradients (`rgdiff.kernels.draw_token`).

    Returns:
      The process.

    Raises:
      ValueError: for a Gaussian schedule, fewer than two classes, an unknown relaxation, or a temperature that is not positive.

    References: MDLM (arXiv 2406.07524, eq. 7).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 2, classes=3)
      >>> kernel = process.forward(jax.nn.one_hot(jnp.array([[0, 2]]), 3), 0.25)
      >>> print(jnp.exp(kernel.log_p)[0])  # token, or mask with probability t
      [[0.75 0.   0.   0.25]
       [0.   0.   0.75 0.25]]
    """
    shape = (shape,) if isinstance(shape, int) else tuple(int(d) for d in shape)
    checks.one_of("relaxation", relaxation, RELAXATIONS)
    return MaskedProcess(
        checks.schedule(schedule, "a masked process", masks=True),
        checks.positive("gumbel_temperature", gumbel_temperature),
        shape,
        checks.at_least("classes", classes, 2),
        relaxation,
    )


def first_hitting(process: MaskedProcess) -> FirstHittingProcess:
    """Build the masked process seen from event to event: its chains have L moves and no discretisation error.

    Every sampler and tuner takes it. The path KL of such a chain is sum over m of E[(1/m) sum over m masked positions
    of KL], the limit of the masked process' own as steps shrink. A network sees the times of `times()`, at which as
    many positions are masked on average.

    Args:
      process: from `masked`, with L positions.

    Returns:
      The process.

    Raises:
      ValueError: for a process that is not masked.

    References: first-hitting sampler (arXiv 2409.02908).

    Example:
      >>> import rgdiff
      >>> process = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 2, classes=3)
      >>> print(rgdiff.processes.first_hitting(process).times())
      [1.  0.5 0. ]
    """
    if not isinstance(process, MaskedProcess):
        raise ValueError(f"first_hitting needs a masked process, got {type(process).__name__}")
    return FirstHittingProcess(
        process.schedule, process.gumbel_temperature, process.shape, process.classes, process.relaxation
    )


def product(**parts: Process) -> ProductProcess:
    """Build a process on mixed states: dicts with one entry per name, e.g. product(adjacency=masked(...), x=gaussian(...)).

    Args:
      parts: a process per name, as keywords; the names are those of the state's dict. One denoiser predicts all parts.

    Returns:
      The process, whose parts are noised independently.

    Raises:
      ValueError: without a part, or for a part that is not a process.

    Example:
      >>> import jax, rgdiff
      >>> tokens = rgdiff.processes.masked(rgdiff.schedules.log_linear_mask(), 5, classes=4)
      >>> x = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (2,))
      >>> draw = rgdiff.processes.product(tokens=tokens, x=x).prior(3).sample(jax.random.key(0))
      >>> {name: leaf.shape for name, leaf in draw.items()}
      {'tokens': (3, 5, 5), 'x': (3, 2)}
    """
    if not parts:
        raise ValueError("product() needs at least one named process, e.g. product(tokens=masked(...))")
    return ProductProcess({name: checks.noising_process(part, f"product({name}=...)") for name, part in parts.items()})
