"""SEIKO: rounds of queries to an expensive oracle, a refit after each, and a better model for the next (arXiv 2402.16359).

A round draws queries from the current model, learns a reward model with its uncertainty from all answers
(`rgdiff.surrogates`), and improves the model under the *optimistic* reward: by tuning it with two KL anchors (`seiko`), or by
steering the prior's chain alone (`steered`). Both are `Online` methods. Where answers come days later, from an experiment, use
`rgdiff.runtime.campaign`, which keeps the same parts on disk.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks, samplers, surrogates
from rgdiff.shards import Shards, on_mesh, whole
from rgdiff.tuners._loop import train
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


class Queries(NamedTuple):
    """Samples of the current model whose rewards are queried.

    Args:
      x0: [B, ...].
      cond: conditions [B, ...], or None.
    """

    x0: State
    cond: Cond = None


class RoundState(NamedTuple):
    """The state between rounds. `best` are the parameters to sample with.

    Args:
      params: of the current model p_i.
      observations: all answers so far, in their first `asked` rows.
      asked: number of queries so far.
      belief, feasibility: of the last refit, zeros before the first.
      step: i, the rounds done.
      skipped: tuning steps whose gradient was not finite.
    """

    params: Params
    observations: surrogates.Observations
    asked: Array
    belief: Any
    feasibility: Any
    step: Array
    skipped: Array

    @property
    def best(self) -> Params:
        """The parameters to sample with."""
        return self.params


@pytree
class Rounds(abc.ABC):
    """The shared part of all methods with a surrogate: drawing queries, taking answers in, and refitting."""

    process: Process
    denoiser: Denoiser
    times: Array
    surrogate: Any
    classifier: Any
    feasibility_weight: Array
    noise: Array
    batch: int = static()
    capacity: int = static()
    shards: Shards | None = static(default=None, kw_only=True)

    def init(self, params: Params) -> RoundState:
        """Begin with `params` and no observation."""
        params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        chain = samplers.drawing(samplers.ancestral(self.process, self.denoiser), self.times)
        blank = jax.eval_shape(lambda: chain(jax.random.key(0), 1))
        observations = surrogates.empty(blank, self.capacity)
        zeros = lambda fit: jax.tree.map(  # noqa: E731
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(fit, jax.random.key(0), observations)
        )
        belief = zeros(self.surrogate.fit)
        feasibility = None if self.classifier is None else zeros(self.classifier.fit)
        counts = [jnp.int32(0) for _ in range(3)]  # buffers of their own: `fit` donates them
        return RoundState(params, observations, counts[0], belief, feasibility, *counts[1:])

    @abc.abstractmethod
    def sampler(self, state: RoundState) -> Any:
        """Return the sampler of the current model."""

    @abc.abstractmethod
    def improve(self, key: Key, state: RoundState) -> tuple[RoundState, Info]:
        """Make the model of the next round from the last refit."""

    def ask(self, key: Key, state: RoundState, count: int, cond: Cond = None) -> Queries:
        """Draw queries from the current model; in the first round it is the prior.

        Args:
          key: a typed PRNG key.
          state: a `RoundState`.
          count: number of queries, static.
          cond: conditions [count, ...], or None.
        """
        checks.conditions(cond, count)
        return Queries(self._drawing(self.sampler(state))(key, count, cond), cond)

    def _drawing(self, sampler: Any) -> Any:
        return on_mesh(samplers.drawing(sampler, self.times), self.shards)

    def rollout(self, key: Key, state: RoundState, cond: Cond = None) -> Queries:
        return self.ask(key, state, self.batch, cond)

    def tell(self, state: RoundState, queries: Queries, rewards: Array) -> tuple[RoundState, Info]:
        """Take the answers in; a reward that is not finite marks an infeasible query.

        Args:
          state: a `RoundState`.
          queries: from `ask`, B rows.
          rewards: answers [B], reward's unit.

        Returns:
          The next state, and the info of `figures` with `dropped`: answers that did not fit into `capacity`, inside `jit`.

        Raises:
          ValueError: outside `jit`, for answers that do not fit.
        """
        answered = whole((queries.x0, rewards), self.shards)  # every device learns from all answers
        observations = surrogates.append(state.observations, state.asked, *answered)
        told = state._replace(observations=observations, asked=state.asked + rewards.shape[0])
        dropped = jnp.clip(told.asked - self.capacity, 0, rewards.shape[0])
        return told, self.figures(state, queries, rewards) | {"dropped": dropped}

    def figures(self, state: RoundState, queries: Queries, rewards: Array) -> Info:
        """Return the figures of a round's answers: `reward` (mean over feasible ones), `best`, `infeasible` (a share).

        And of the belief that proposed the queries, before it sees their answers: `bonus`, the mean of upper - mean, and
        `covered`, the share of answers within 1.96 sqrt(deviation^2 + noise^2) of the mean; both NaN in the first round.

        Args:
          state: a `RoundState`.
          queries: from `ask`, B rows.
          rewards: answers [B], reward's unit.
        """
        feasible = jnp.isfinite(rewards)
        count = jnp.sum(feasible)
        over = lambda values: jnp.sum(jnp.where(feasible, values, 0.0)) / jnp.where(count > 0, count, jnp.nan)  # noqa: E731
        mean = state.belief.mean(queries.x0, queries.cond)
        upper = state.belief.upper(queries.x0, queries.cond)
        spread = jnp.hypot(state.belief.std(queries.x0, queries.cond), self.noise)
        near = jnp.abs(rewards - mean) <= 1.96 * spread
        known = lambda value: jnp.where(state.step > 0, value, jnp.nan)  # noqa: E731
        return {
            "reward": over(rewards),
            "best": jnp.max(jnp.where(feasible, rewards, -jnp.inf)),
            "infeasible": 1 - count / rewards.shape[0],
            "bonus": known(jnp.mean(upper - mean)),
            "covered": known(over(near.astype(jnp.float32))),
        }

    def refit(self, key: Key, state: RoundState) -> RoundState:
        """Learn the reward, its uncertainty and the feasibility from all answers; anew, unless the surrogate is `warm`."""
        key_reward, key_feasible = jax.random.split(key)
        fit = lambda previous: self.surrogate.fit(key_reward, state.observations, previous)  # noqa: E731
        if getattr(self.surrogate, "warm", False):
            belief = jax.lax.cond(state.step > 0, lambda: fit(state.belief), lambda: fit(None))
        else:
            belief = fit(None)
        if self.classifier is None:
            return state._replace(belief=belief)
        return state._replace(belief=belief, feasibility=self.classifier.fit(key_feasible, state.observations))

    def reward(self, state: RoundState) -> Any:
        """Return the optimistic reward of the last refit, r(x0) + g(x0), plus weight * log p(feasible | x0)."""
        return surrogates.Optimistic(state.belief, state.feasibility, self.feasibility_weight)

    def update(self, key: Key, state: RoundState, experience: Queries, rewards: Array) -> tuple[RoundState, Info]:
        """Finish the round in one program: answers, refit, better model."""
        key_fit, key_model = jax.random.split(key)
        state, told = self.tell(state, experience, rewards)
        state, info = self.improve(key_model, self.refit(key_fit, state))
        return state._replace(step=state.step + 1), told | info

    def network_calls(self) -> int:
        """Calls of the denoiser per query."""
        return self.times.shape[0] - 1 + self.process.projects


@pytree
class Bound:
    """A model at some parameters, as a denoiser that is the same program at others."""

    model: Model
    params: Params

    def __call__(self, x: State, t: Array, cond: Cond = None) -> State:
        return self.model(self.params)(x, t, cond)


@pytree
class Seiko(Rounds):
    """Tunes the model under two KL anchors. Build it with `seiko`."""

    model: Model
    temperature: Array
    proximal_weight: Array
    inner: Callable[..., Any] = static()
    schedule: str = static()
    steps: int = static()

    def sampler(self, state: RoundState) -> Any:
        return samplers.ancestral(self.process, Bound(self.model, state.params))

    def weights(self, state: RoundState) -> tuple[Array, Array]:
        """Return alpha and beta_{i-1} of the round under way, in the reward's unit per nat."""
        growing = self.proximal_weight * state.step
        return self.temperature, {"linear": growing, "constant": self.proximal_weight}[self.schedule]

    def tuner(self, state: RoundState) -> Any:
        """Return the tuner of the round under way, for `tuners.fit` from `state.params`.

        Its structure is the same in every round, so that its step is compiled once.
        """
        references = [self.denoiser, Bound(self.model, state.params)]
        tuner = self.inner(self.reward(state), reference=references, temperature=list(self.weights(state)))
        return on_mesh(tuner, self.shards)

    def improve(self, key: Key, state: RoundState) -> tuple[RoundState, Info]:
        tuner = self.tuner(state)
        tuned, infos = train(tuner, key, tuner.init(state.params), None, self.steps, None)
        last = {f"tuning_{name}": value[-1] for name, value in infos.items()}
        return state._replace(params=tuned.best, skipped=state.skipped + tuned.skipped), last


@pytree
class Steered(Rounds):
    """Leaves the model as it is and steers its chain by the optimistic reward. Build it with `steered`."""

    steer: Callable[..., Any] = static()

    def sampler(self, state: RoundState) -> Any:
        return self.steer(self.reward(state))

    def ask(self, key: Key, state: RoundState, count: int, cond: Cond = None) -> Queries:
        first = self._drawing(samplers.ancestral(self.process, self.denoiser))
        later = self._drawing(self.sampler(state))
        x0 = jax.lax.cond(state.step == 0, lambda: first(key, count, cond), lambda: later(key, count, cond))
        return Queries(x0, cond)

    def improve(self, key: Key, state: RoundState) -> tuple[RoundState, Info]:
        return state, {}


def _shared(
    process: Process,
    denoiser: Denoiser,
    times: Array,
    surrogate: Any,
    classifier: Any,
    feasibility_weight: float,
    noise: float,
    batch: int,
    capacity: int,
) -> dict[str, Any]:
    for name, one in (("surrogate", surrogate), ("feasibility", classifier)):
        if one is not None and not callable(getattr(one, "fit", None)):
            raise ValueError(
                f"{name} must have fit(key, observations), see rgdiff.surrogates; got {type(one).__name__}"
            )
    batch, capacity = checks.at_least("batch", batch, 1), checks.at_least("capacity", capacity, 1)
    if capacity < batch:
        raise ValueError(f"capacity must hold every answer of all rounds, at least a batch of {batch}; got {capacity}")
    return {
        "process": process,
        "denoiser": callable_pytree(denoiser, "a denoiser"),
        "times": checks.times(times, process),
        "surrogate": surrogate,
        "classifier": classifier,
        "feasibility_weight": checks.positive("feasibility_weight", feasibility_weight, zero=True),
        "noise": checks.positive("noise", noise, zero=True),
        "batch": batch,
        "capacity": capacity,
    }


def seiko(
    model: Model,
    process: Process,
    times: Array,
    surrogate: Any,
    inner: Callable[..., Any],
    *,
    prior: Denoiser,
    temperature: float,
    batch: int,
    capacity: int,
    proximal_weight: float | None = None,
    schedule: str = "linear",
    steps: int = 100,
    feasibility: Any = None,
    feasibility_weight: float = 0.0,
    noise: float = 0.0,
) -> Seiko:
    """Fine-tune a model by rounds of queries to an expensive reward (SEIKO, arXiv 2402.16359, algorithm 1).

    Round i draws queries from p_{i-1}, learns the reward r_i and its bonus g_i from all answers, and tunes from p_{i-1}

        p_i = argmax E[r_i + g_i] - alpha KL(p || prior) - beta_{i-1} KL(p || p_{i-1}),

    whose optimum is proportional to exp((r_i + g_i)/(alpha + beta)) prior^(alpha/(alpha + beta)) p_{i-1}^(beta/(alpha + beta)).
    This is the optimum over all laws; Gaussian chains, whose moves keep their variances, come near it
    (`rgdiff.tuners.reward_backprop`). With beta_{i-1} = alpha (i - 1), the default, it is
    prior * exp(sum_{j <= i} (r_j + g_j) / (alpha i)), and where |r_j - r| <= g_j the regret of E[r] - alpha KL is at most
    2 E_{p_i}[g_i], averaged over rounds.

    Args:
      model: params -> denoiser, (x [B, ...], t, cond) -> E[x0 | x_t] or logits.
      process: of the chain that is sampled, with a law (eta > 0).
      times: the grid [T + 1], from `process.times(steps)`.
      surrogate: from `rgdiff.surrogates`; `surrogates.greedy(...)` leaves the bonus out, `surrogates.thompson(...)` draws.
      inner: (reward, reference=[two], temperature=[two]) -> tuner, a setting of `reward_backprop`, bound once:
        `lambda reward, **kl: tuners.drakes(model, process, reward, times, optimizer, batch=64, **kl)`.
      prior: the pre-trained denoiser, (x, t, cond) -> E[x0 | x_t] or logits: the first anchor.
      temperature: alpha, in the reward's unit per nat of path KL.
      batch: queries a round; `ask` takes another number.
      capacity: rows for the answers of all rounds, at least `batch`.
      proximal_weight: beta, of the KL to the last round's model, the same unit; alpha by default.
      schedule: beta_{i-1} is beta * (i - 1) under `linear`, beta under `constant`.
      steps: steps of the inner tuner in `update`; with `tuner(state)` and `tuners.fit` any number.
      feasibility, feasibility_weight: a classifier of feasible queries from `rgdiff.surrogates`, and the weight of its
        log-probability in the optimistic reward, reward's unit per nat; infeasible queries never enter the fit of the reward.
      noise: standard deviation of an answer given x0, reward's unit; for the figure `covered` alone.

    Returns:
      An online method, a step of which is a round: `fit(as_tuner(method, reward), ...)`, `fit_online(method, ..., reward)`, or
      `runtime.campaign.open_campaign`. `method.sampler(state)` samples the current model. info: reward, best, infeasible, bonus,
      covered, dropped, and those of the inner tuner as tuning_*.

    Raises:
      ValueError: for eta = 0, a surrogate without `fit`, an inner that cannot be called, a capacity below the batch.

    Note:
      The released code anchors to p_{i-1} alone, averages its KL over dimensions (6e-5 per nat), centres the covariance
      of its bonus, which then does not shrink with data (`surrogates.ridge(centred=True)`), and keeps the law of x_T, as
      we do unless `process` holds a learnt one (`tuners.elegant`).

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import seiko, surrogates, tuners
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> times, prior = process.times(4), tuners.standard_normal(process)
      >>> model = lambda w: lambda x, t, cond=None: prior(x, t) + process.schedule.sigma(t) ** 2 * w  # of N(w, 1)
      >>> inner = lambda r, **kl: tuners.draft(model, process, r, times, tuners.adamw(0.1), batch=4, **kl)
      >>> method = seiko.seiko(model, process, times, surrogates.ridge(surrogates.with_constant), inner, prior=prior,
      ...                      temperature=1.0, batch=16, capacity=32, steps=5)
      >>> tuner = tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0])
      >>> state = tuners.fit(tuner, jax.random.key(0), tuner.init(jnp.zeros(1)), 2)  # two rounds
      >>> print(int(state.asked), bool(state.params[0] > 0))
      32 True
    """
    checks.law(process, "seiko, whose anchors are KL terms,")
    if not callable(inner):
        raise ValueError(f"inner must map (reward, reference=, temperature=) to a tuner, got {type(inner).__name__}")
    shared = _shared(process, prior, times, surrogate, feasibility, feasibility_weight, noise, batch, capacity)
    weight = checks.positive("temperature", temperature, zero=True)
    return Seiko(
        **shared,
        model=callable_pytree(model, "model (params -> denoiser)"),
        temperature=weight,
        proximal_weight=weight
        if proximal_weight is None
        else checks.positive("proximal_weight", proximal_weight, zero=True),
        inner=inner,
        schedule=checks.one_of("schedule", schedule, ("linear", "constant")),
        steps=checks.at_least("steps", steps, 1),
    )


def steered(
    process: Process,
    times: Array,
    surrogate: Any,
    steer: Callable[..., Any],
    *,
    prior: Denoiser,
    batch: int,
    capacity: int,
    feasibility: Any = None,
    feasibility_weight: float = 0.0,
    noise: float = 0.0,
) -> Steered:
    """Steer the prior's chain by the optimistic reward of each round, without any tuning.

    With a sampler of the tilted law this is SEIKO with beta = 0: round i draws from prior * exp((r_i + g_i)/alpha)/Z, as exactly as
    the sampler does.

    Args:
      process: of the chain that is sampled.
      times: the grid [T + 1], from `process.times(steps)`.
      surrogate: from `rgdiff.surrogates`; `surrogates.greedy(...)` leaves the bonus out, `surrogates.thompson(...)` draws.
      steer: reward -> sampler, bound once: SVDD, SMC, classifier guidance or best-of-N with the reward it is given, e.g.
        `lambda reward: samplers.svdd(process, prior, values.posterior_mean(reward, process, prior), temperature=0.1, candidates=16)`.
      prior: the pre-trained denoiser, (x, t, cond) -> E[x0 | x_t] or logits, sampled in the first round.
      batch: queries a round; `ask` takes another number.
      capacity: rows for the answers of all rounds, at least `batch`.
      feasibility, feasibility_weight: a classifier of feasible queries from `rgdiff.surrogates`, and the weight of its
        log-probability in the optimistic reward, reward's unit per nat.
      noise: standard deviation of an answer given x0, reward's unit; for the figure `covered` alone.

    Returns:
      An online method, as `seiko`; its parameters are not used: begin with `init(None)`.

    Raises:
      ValueError: for a surrogate without `fit`, a steer that cannot be called, a capacity below the batch.

    Example:
      >>> import jax, jax.numpy as jnp, rgdiff
      >>> from rgdiff import seiko, surrogates, tuners
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.cosine_vp(), (1,))
      >>> times, prior = process.times(4), tuners.standard_normal(process)
      >>> steer = lambda r: rgdiff.samplers.best_of_n(rgdiff.samplers.ancestral(process, prior), r, 4)
      >>> method = seiko.steered(process, times, surrogates.ridge(surrogates.with_constant), steer, prior=prior, batch=16, capacity=32)
      >>> tuner = tuners.as_tuner(method, lambda x0, cond=None: x0[:, 0])
      >>> print(int(tuners.fit(tuner, jax.random.key(0), tuner.init(None), 2).asked))
      32
    """
    if not callable(steer):
        raise ValueError(f"steer must map a reward to a sampler, got {type(steer).__name__}")
    shared = _shared(process, prior, times, surrogate, feasibility, feasibility_weight, noise, batch, capacity)
    return Steered(**shared, steer=steer)
