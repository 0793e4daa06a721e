"""Adjoint matching: reward tuning with a path KL as a regression, in Gaussian chains that forget x_T (arXiv 2409.08861).

A chain is drawn and held constant. The reward's gradient goes back along it through the moves of the *prior*: the lean adjoint
(eq. 38, 39). Every tuned kernel is then matched to the prior's, tilted by the adjoint of the state it leads to (eq. 37):

    a_n = grad r(x0) / temperature,   a_i = J_i(x_i)' a_{i+1},   loss = sum over calls of KL(k_i || k_i^prior.tilt(a_{i+1}))

J_i is the Jacobian of the prior's mean map m_i, so the chain of the tuned network is never differentiated. The recursion is of the
discrete chain, and no Euler step of the paper's ODE. Where the loss is stationary for every call and state, its tuned mean is
m_i + std_i^2 E[a_{i+1} | x_i]. The chain's Bellman equation says the same of the maximum of E[r] - temperature * path KL over the
means: there grad V_i = J_i' E[grad V_{i+1}], as the cost |y - m_i(x)|^2 / (2 std_i^2) depends on x through m_i alone. So the fixed
point in T moves is the optimum of `reward_backprop` with a temperature, for every T, and within 1/T of p(x0) exp(r/temperature)/Z.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rgdiff import checks
from rgdiff._settings import setting_of
from rgdiff.kernels import Gaussian
from rgdiff.processes import GaussianProcess
from rgdiff.rewards import evaluate
from rgdiff.samplers._loop import roll
from rgdiff.shards import bound, split
from rgdiff.tuners._chain import Chain, hold
from rgdiff.tuners._reward_backprop import RewardBackprop, reward_backprop
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Info,
    Key,
    Model,
    Params,
    Process,
    Reward,
    State,
    pytree,
    static,
)

LARGEST_SNR = 0.01  # at the chain's first time: for data of variance 1, x_T then has 1 % of the variance of x0 at most

Law = Callable[[Denoiser, State], Gaussian]  # a denoiser and the state before a call -> the kernel of that call


@pytree
class AdjointMatching(RewardBackprop):
    """Matches every kernel to the prior's, tilted by the lean adjoint. Build it with `adjoint_matching`.

    Args:
      late: number of calls at the end of the chain that are always in the loss.
      drawn: number of earlier calls in the loss, drawn anew in every step.
      loss_limit: of one call's term, nats, or None.
    """

    late: int = static(default=1)
    drawn: int = static(default=0)
    loss_limit: Array | None = None

    def network_calls(self) -> int:
        """Calls of the tuned denoiser per sample and step, forward passes only: the chain's, and those in the loss."""
        return self._calls + self.late + self.drawn

    def _info(self, sums: dict[str, Array]) -> Info:
        return super()._info(sums) | {"loss": sums["loss"] / sums["feasible"]}

    def _total(
        self, params: Params, key: Key, cond: Cond, temperature: Array | None, micro: bool = True
    ) -> tuple[Array, dict[str, Array]]:
        """The sum of the loss over feasible examples of one (micro-)batch, whose gradient is taken call by call, and rows for the report."""
        temperature = self.temperature if temperature is None else temperature
        batch = self.batch // self.micro_batches if micro else self.batch
        checks.conditions(cond, batch)
        key_chain, key_calls = jax.random.split(key)
        moving, params = params, hold(params, False)
        states, x0 = self._path(params, key_chain, batch, cond)
        rewards, back = jax.vjp(lambda x0: self._judge(x0, cond), x0)
        feasible = jnp.isfinite(rewards)
        # The projection is priced as a move to alpha x0 with the noise of its own time (`samplers.projection_kl`).
        slope = 1.0 / (temperature[0] * self.process.schedule.alpha(self.times[-1]))  # type: ignore[attr-defined]
        adjoint = back(jnp.full_like(rewards, slope))[0]
        match = lambda law, x, adjoint, weight: self._match(law, params, x, adjoint, feasible, weight)  # noqa: E731
        weights, last = self._weights(key_calls), jax.tree.map(lambda x: x[-1], states)

        def projection(denoiser: Denoiser, x: State) -> Gaussian:
            t = self.times[-1]
            return self.process.forward(self.process.mean(x, t, denoiser(x, t, cond)), t)  # type: ignore[return-value]

        def step(carry: Any, where: Any) -> tuple[Any, None]:
            (adjoint, total), (x, t, s, weight) = carry, where
            law = lambda denoiser, x: self.process.reverse(x, t, s, denoiser(x, t, cond))  # noqa: E731
            adjoint, more = match(law, x, adjoint, weight)
            return (adjoint, jax.tree.map(jnp.add, total, more)), None

        carry = match(projection, last, adjoint, weights[-1])
        where = jax.tree.map(lambda x: x[:-1], states), self.times[:-1], self.times[1:], weights[:-1]
        if weights.shape[0] == 2:  # see samplers._loop.roll
            carry, _ = step(carry, jax.tree.map(lambda w: w[0], where))
        elif weights.shape[0] > 2:
            carry, _ = jax.lax.scan(step, carry, where, reverse=True)
        gradients, loss, kl = carry[1]
        rows = {"reward": jnp.where(feasible, rewards, 0.0), "feasible": feasible.astype(jnp.float32), "loss": loss}
        rows["penalty"] = kl[None]
        if self.heldout is not None:
            rows["heldout"] = jnp.where(feasible, evaluate(self.heldout, x0, cond), 0.0)
        along = jax.tree.map(
            lambda g, p: jnp.vdot(g, p - hold(p, False)), gradients, moving
        )  # 0, whose gradient is theirs
        return loss.sum() + sum(jax.tree.leaves(along)), rows

    def _path(self, params: Params, key: Key, batch: int, cond: Cond) -> tuple[State, State]:
        """Draw the tuned chain: the state before every call [calls, B, ...], and x0; constants."""
        chain = Chain(self.process, bound(self.model, params, "a denoiser"), live=False)
        carry = split(chain.init(jax.random.fold_in(key, 0), batch, self.times[0], cond), self.shards)
        states = carry.x[None]
        if self.times.shape[0] > 1:
            carry, kept = roll(chain, key, carry, self.times, cond, keep=lambda carry, info: carry.x)
            states = jnp.concatenate([states, kept])
        return states, hold(chain.final(carry, self.times[-1], cond)[0], False)

    def _weights(self, key: Key) -> Array:
        """The weight of every call in the loss [calls]: 1 for the last ones, 0 or n / drawn for the n others, so that the mean is 1."""
        early = self._calls - self.late
        weights = jnp.ones(self._calls, self.times.dtype)
        if not early:
            return weights
        chosen = jax.random.permutation(key, early)[: self.drawn]
        return weights.at[:early].set(0.0).at[chosen].set(early / max(self.drawn, 1))

    def _match(
        self, law: Law, params: Params, x: State, adjoint: State, feasible: Array, weight: Array
    ) -> tuple[State, tuple[Params, Array, Array]]:
        """Return the adjoint of the state before a call, and the call's weighted gradient, and its loss and KL to the prior for each example."""

        def moved(x: State) -> tuple[State, Gaussian]:
            kernel = law(self.references[0], x)
            return kernel.mean, kernel

        _, back, prior = jax.vjp(moved, x, has_aux=True)
        target = prior.tilt(adjoint)

        def loss(params: Params) -> tuple[Array, tuple[Array, Array]]:
            kernel = law(bound(self.model, params, "a denoiser"), x)
            far = kernel.kl(target)
            if self.loss_limit is not None:
                far = jnp.minimum(far, self.loss_limit)
            far = weight * jnp.where(feasible, far, 0.0)
            return jnp.sum(far), (far, weight * kernel.kl(prior))

        def matched(params: Params) -> tuple[Params, Array, Array]:
            gradients, rows = jax.grad(loss, has_aux=True)(params)
            return gradients, *rows

        def skipped(params: Params) -> tuple[Params, Array, Array]:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(matched, params))

        every = self.late == self._calls
        return back(adjoint)[0], matched(params) if every else jax.lax.cond(weight > 0, matched, skipped, params)


def _memoryless(process: Any, times: Array) -> None:
    """Refuse a chain whose x0 depends on its x_T: no tuning of its moves reaches the tilted prior."""
    if not (isinstance(process, GaussianProcess) and process.projects):
        raise ValueError(
            f"adjoint_matching needs a process from processes.gaussian, got {type(checks.noising_process(process, 'adjoint_matching')).__name__}; "
            "for tokens see drakes"
        )
    if not process.stochastic or (not isinstance(process.eta, Tracer) and float(process.eta) < 1):
        raise ValueError(
            f"adjoint_matching needs a memoryless chain, eta = 1, got eta = {float(process.eta):g}, where x0 depends on x_T; "
            "build the process with eta = 1, or take elegant, which tunes the law of x_T"
        )
    level = checks.log_snr(process.schedule, times[:1])
    if not isinstance(level, Tracer) and (snr := float(np.exp(np.asarray(level)[0]))) > LARGEST_SNR:
        raise ValueError(
            f"adjoint_matching needs a memoryless chain, and at its first time {float(times[0]):g} x_T keeps an SNR of {snr:.2g} of x0, "
            f"more than {LARGEST_SNR:g}; begin nearer to t = 1, or take elegant, which tunes the law of x_T"
        )


@setting_of(
    reward_backprop,
    fixed=(  # nothing is differentiated through the chain
        "truncation",
        "renoised",
        "on_trajectory",
        "reduce",
        "kl_budget",
        "kl_rate",
        "penalty",
        "penalize",
        "projection",
        "gradient",
        "input_gradient",
        "remat",
    ),
)
def adjoint_matching(
    model: Model,
    process: Process,
    reward: Reward,
    times: Array,
    optimizer: Any,
    *,
    reference: Denoiser,
    temperature: float,
    late: int | None = None,
    drawn: int = 0,
    loss_limit: float | None = None,
    **options: Any,
) -> AdjointMatching:
    """Adjoint matching: regress every move on the prior's, tilted by the lean adjoint of the reward (arXiv 2409.08861, eq. 37-39).

        min over params of  E sum over calls of KL(k(. | x_i) || k_prior(. | x_i).tilt(a_{i+1})),   a_n = grad r(x0)/temperature,
        a_i = J_i(x_i)' a_{i+1},   J_i the Jacobian of the prior's mean of x_{i+1} given x_i;   paths and adjoints are constants

    The optimum is near p(x0) exp(r(x0)/temperature)/Z, p the law of the prior's chain, off by about 1/T in T moves: it is that of
    `draft` with a temperature, and `reward_backprop` gives numbers. No law of x_T is learnt, as x_T says nothing of x0 in a
    memoryless chain (theorem 1). That is eta = 1: the ancestral chain, whose noise in small steps is the memoryless
    sigma(t)^2 = 2 eta_t, of variance-preserving and flow priors alike.

    A step draws a chain (T calls of the tuned network), takes one vector-Jacobian product of the prior at each of its states, and
    one gradient of the tuned network at each call in the loss. Stored are the chain's states alone.

    Args:
      process: from `processes.gaussian` with eta = 1 (or more), of either variance.
      reward: (x0 [B, ...], cond) -> [B], differentiable. NaN marks an infeasible sample, which is left out.
      times: the grid [T] of the chain, from `process.times(T)`; at its first time the SNR is at most 0.01.
      reference: the prior's denoiser, (x, t, cond) -> E[x0 | x_t]; it is differentiated in x.
      temperature: alpha, in the reward's unit per nat of path KL, positive; 1 / lambda in the paper.
      late: number of calls at the end of the chain that are always in the loss, all by default; the last one is the projection.
      drawn: number of earlier calls in the loss, drawn uniformly without replacement in every step. The paper has late=10 and
        drawn=10 of 40 (appendix G.2).
      loss_limit: largest term of one call and example, nats; larger ones have no gradient (LCT, appendix G.3). The paper's is of
        |u + sigma a|^2, which is 2 T of these nats where steps have length 1/T. None has no limit.

    Returns:
      A tuner for `fit`; `state.best` holds the tuned parameters. info per step: reward (mean over feasible samples), infeasible
      (count), loss (nats), kl (path KL to the prior, nats; an unbiased estimate where calls are drawn), heldout, gradient_norm,
      skipped.

    Raises:
      ValueError: for a masked or mixed process, eta < 1, a first time with a larger SNR, a reward without a gradient, several
        references, late or drawn outside of the chain, and as `reward_backprop`.

    Note:
      The paper steps an ODE for the adjoint and adds h to the noise's schedule at t = 0 (appendix G.1). Here means, variances and
      Jacobians are those of the chain that is sampled, so that nothing is singular and the fixed point is exact for every T.
      Drawn calls are weighted by how rarely they are drawn, so that the mean of the loss is that of all calls; the paper adds them as they are.
      The last, noiseless step is matched too, at the price that it has in `draft`.

    References: Adjoint Matching (arXiv 2409.08861): theorem 1, eq. 37-39, algorithms 1 and 2, appendix G.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> sigma, prior = process.schedule.sigma, rgdiff.tuners.standard_normal(process)
      >>> model = lambda w: lambda x, t, cond=None: prior(x, t) + sigma(t) ** 2 * w  # of N(w, 1)
      >>> tuner = rgdiff.tuners.adjoint_matching(
      ...     model, process, lambda x, cond=None: x[:, 0], process.times(400), optax.sgd(0.5), batch=2, reference=prior,
      ...     temperature=0.5)
      >>> state = rgdiff.tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 10)
      >>> print(f"{state.params[0]:.1f}")  # the tilted law is N(1 / temperature, 1)
      2.0
    """
    grid = checks.times(times, process)
    _memoryless(process, grid)
    checks.positive("temperature", temperature)
    tuner = reward_backprop(
        model, process, reward, grid, optimizer, reference=reference, temperature=temperature, **options
    )
    if len(tuner.references) != 1:
        raise ValueError(f"adjoint_matching has one reference, the prior, got {len(tuner.references)}")
    calls = grid.shape[0]
    late, drawn = calls if late is None else checks.at_least("late", late, 0), checks.at_least("drawn", drawn, 0)
    if not 1 <= late + drawn <= calls:
        raise ValueError(f"late + drawn must be within the chain's 1 ... {calls} network calls, got {late} + {drawn}")
    return AdjointMatching(
        **{field.name: getattr(tuner, field.name) for field in dataclasses.fields(tuner)},
        late=late,
        drawn=drawn,
        loss_limit=None if loss_limit is None else checks.positive("loss_limit", loss_limit),
    )
