"""SVDD: soft value-based decoding (arXiv 2408.08252). Draw M candidates from the kernel, keep one in proportion to exp(v/tau).

It needs no gradient and no training, so the reward may be a black box. The samples do not interact (but
for `replace`). As M grows their distribution tends to p_pre(x) exp(r(x)/tau)/Z when v is the exact soft value and the initial
draw is selected too (a masked chain begins at one state, and needs no selection there), with an error of order 1/M.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks
from rgdiff.processes import MaskedProcess
from rgdiff.resampling import multinomial
from rgdiff.samplers._evaluate import distinct, evaluate, first_equal, refresh, shares
from rgdiff.samplers._loop import without_gradient
from rgdiff.shards import Shards, by_rows, split, whole
from rgdiff.typing import (
    Array,
    Cond,
    Denoiser,
    Guide,
    Info,
    Key,
    Move,
    Process,
    State,
    Value,
    callable_pytree,
    pytree,
    static,
)

SELECTIONS = ("soft", "argmax")


class SvddCarry(NamedTuple):
    """The state of an SVDD chain.

    `x`: leaves [B, ...]. `prediction`: the denoiser's at x, or None. `value` [B]: the value of x, kept with `timeless` only.
    `stale` [B]: whether the prediction is of an earlier state (`timeless`, with a value of its own network).
    `lineages` [B]: the initial example that each descends from (`replace`).
    """

    x: State
    prediction: Any
    value: Any
    stale: Any
    lineages: Any = None


@pytree
class Svdd:
    """Draws M candidates per move and keeps one. Build it with `svdd`."""

    process: Process
    denoiser: Denoiser
    value: Value
    temperature: Array
    proposal: Guide | None
    candidates: int = static()
    chunk: int = static()
    selection: str = static(default="soft")
    select_initial: bool = static(default=False)
    shared: bool = static(default=False)
    replace: float = static(default=0.0)
    distinct: bool = static(default=False)
    timeless: bool = static(default=False)
    shards: Shards | None = static(default=None)

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> SvddCarry:
        return self.initial(key, batch, t, cond)[0]

    def initial(self, key: Key, batch: int, t: Array, cond: Cond = None) -> tuple[SvddCarry, Info]:
        """Return the beginning of chains and, with `select_initial`, the info of its selection, in the form of a move's.

        `sample(sampler, key, ...)` begins with `sampler.initial(jax.random.fold_in(key, 0), batch, times[0], cond)`; its `keep` is
        called after moves only.
        """
        key_draw, key_select = jax.random.split(key)
        prior = self.process.prior(batch)
        if self.select_initial:
            return self._choose(key_select, self._draw(key_draw, prior), None, t, cond)
        x = prior.sample(key_draw)
        lineages = self._lineages(batch)
        if not self.timeless:
            return SvddCarry(x, self.denoiser(x, t, cond) if self.shared else None, None, None, lineages), {}
        value, prediction = evaluate(self.process, self.value, self.shared, x, t, cond)
        if self.shared:
            return SvddCarry(x, prediction, value, None, lineages), {}
        return SvddCarry(x, self.denoiser(x, t, cond), value, jnp.zeros(batch, bool), lineages), {}

    def _lineages(self, batch: int) -> Array | None:
        return jnp.arange(batch, dtype=jnp.int32) if self.replace else None

    def step(self, key: Key, carry: SvddCarry, t: Array, s: Array, cond: Cond = None) -> tuple[SvddCarry, Info]:
        key_draw, key_select = jax.random.split(key)
        prediction = self._predict(carry, t, cond)
        carry = carry._replace(prediction=prediction)
        kernel = self.process.reverse(carry.x, t, s, prediction)
        if self.proposal is None:
            return self._choose(key_select, self._draw(key_draw, kernel), carry, s, cond)
        proposal = self.proposal(kernel, Move(carry.x, t, s, cond, prediction))
        candidates = self._draw(key_draw, proposal)
        log_ratio = jax.vmap(kernel.log_prob)(candidates) - jax.vmap(proposal.log_prob)(candidates)
        return self._choose(key_select, candidates, carry, s, cond, log_ratio)

    def final(self, carry: SvddCarry, t: Array, cond: Cond = None) -> tuple[State, Info]:
        prediction = carry.prediction
        if self.process.projects and not self.shared:
            prediction = self.denoiser(carry.x, t, cond)
        info = {"lineages": carry.lineages} if self.replace else {}
        return self.process.finalize(carry.x, t, prediction), info

    def network_calls(self, moves: int) -> int:
        """Return the largest number of denoiser calls per sample over a chain of `moves` moves (the value's own network not counted).

        With `distinct` there are fewer: info["evaluations"] counts the evaluated states.
        """
        if not self.shared:
            return moves + self.process.projects
        first = self.candidates if self.select_initial else 1
        return first + self.candidates * (moves if self.process.projects else moves - 1)

    def value_calls(self, moves: int) -> int:
        """Evaluations of the value per sample, at most."""
        return self.candidates * (moves + self.select_initial)

    def _predict(self, carry: SvddCarry, t: Array, cond: Cond) -> Any:
        if self.shared:
            return carry.prediction
        if carry.stale is None:
            return self.denoiser(carry.x, t, cond)
        again = by_rows(refresh, self.shards, (None, 0, 0, None, 0, 0))
        return again(self.denoiser, carry.prediction, carry.x, t, cond, carry.stale)

    def _draw(self, key: Key, kernel: Any) -> State:
        return jax.vmap(without_gradient(kernel).sample)(jax.random.split(key, self.candidates))

    def _choose(
        self,
        key: Key,
        candidates: State,
        parent: SvddCarry | None,
        t: Array,
        cond: Cond,
        log_ratio: Array | None = None,
    ) -> tuple[SvddCarry, Info]:
        """Weigh candidates [M, B, ...] at time t by exp(v/tau) kernel/proposal, and keep one per example."""
        values, predictions, evaluations = self._evaluate(candidates, parent, t, cond)
        log_weights = log_soft_weights(values, self.temperature)
        if log_ratio is not None:
            log_weights += log_ratio
        if self.selection == "soft":
            index = jax.random.categorical(key, log_weights, axis=0)
        else:
            index = jnp.argmax(log_weights, axis=0)
        # Indexed per example, not by (index, arange): a batch split over devices stays where it is.
        pick = lambda leaf: jax.vmap(lambda column, i: column[i], in_axes=(1, 0))(leaf, index)  # noqa: E731
        info = {
            "value": pick(values),
            "values": values,
            "candidates": candidates,
            "log_weights": log_weights,
            "kl": self._selection_kl(log_weights, pick(log_weights)) - (0.0 if log_ratio is None else pick(log_ratio)),
            "infeasible": jnp.sum(jnp.isnan(values), axis=0),
        }
        if self.distinct:
            info["evaluations"] = evaluations
        x, prediction = jax.tree.map(pick, (candidates, predictions))
        lineages = self._lineages(values.shape[1]) if parent is None else parent.lineages
        carry = SvddCarry(x, prediction, info["value"] if self.timeless else None, None, lineages)
        if self.timeless and not self.shared:
            carry = self._keep_prediction(carry, parent, t, cond)
        if self.replace:
            if cond is not None:
                raise ValueError("replace moves samples within the batch, away from their conditions; give replace=0")
            carry, info["value"] = self._resample(jax.random.fold_in(key, 1), carry, info["value"])
        return carry, info

    def _keep_prediction(self, carry: SvddCarry, parent: SvddCarry | None, t: Array, cond: Cond) -> SvddCarry:
        """Hand the parent's prediction on, marked where the state has changed."""
        if parent is None:
            return carry._replace(prediction=self.denoiser(carry.x, t, cond), stale=jnp.zeros(carry.x.shape[0], bool))
        changed = (carry.x != parent.x).reshape(carry.x.shape[0], -1).any(-1)
        return carry._replace(prediction=parent.prediction, stale=changed)

    def _resample(self, key: Key, carry: SvddCarry, values: Array) -> tuple[SvddCarry, Array]:
        """Replace the lowest of the batch by draws in proportion to exp(v/tau) from all of it (SVDD-R)."""
        count, values = round(self.replace * values.shape[0]), whole(values, self.shards)
        winners = multinomial(key, log_soft_weights(values, self.temperature), count)
        lowest = jnp.argsort(jnp.where(jnp.isnan(values), -jnp.inf, values))[:count]
        source = jnp.arange(values.shape[0]).at[lowest].set(winners)
        return split(jax.tree.map(lambda leaf: leaf[source], (carry, values)), self.shards)

    def _selection_kl(self, log_weights: Array, won: Array) -> Array:
        """Estimate of KL(selected || proposal), nats [B]: log w_won / mean w; for argmax, its exact value without ties."""
        if self.selection == "soft":
            return won - jax.nn.logsumexp(log_weights, 0) + jnp.log(self.candidates)
        return jnp.full_like(won, jnp.log(self.candidates) - (self.candidates - 1) / self.candidates)

    def _evaluate(self, candidates: State, parent: SvddCarry | None, t: Array, cond: Cond) -> tuple[Array, Any, Array]:
        """Values [M, B], predictions [M, B, ...] where the value shares the denoiser, and states evaluated per example [B]."""
        pieces = self.candidates // self.chunk
        batch = jax.tree.leaves(candidates)[0].shape[1]
        if self.distinct:
            each = by_rows(type(self)._evaluate_distinct, self.shards, (None, 1, 0, None, 0), (1, 1, 0))
            return each(self, candidates, parent, t, cond)
        run = lambda x, conds: evaluate(self.process, self.value, self.shared, x, t, conds)  # noqa: E731

        # Rows of one example stay together, so that a batch split over devices is evaluated where it lies.
        def fold(leaf: Array) -> Array:
            leaf = jnp.moveaxis(leaf.reshape(pieces, self.chunk, *leaf.shape[1:]), 1, 2)
            return leaf.reshape(pieces, batch * self.chunk, *leaf.shape[3:])

        def unfold(leaf: Array) -> Array:
            leaf = jnp.moveaxis(leaf.reshape(pieces, batch, self.chunk, *leaf.shape[2:]), 2, 1)
            return leaf.reshape(self.candidates, batch, *leaf.shape[3:])

        conds = jax.tree.map(lambda c: jnp.repeat(c, self.chunk, axis=0), cond)
        folded = jax.tree.map(fold, candidates)
        if pieces == 1:
            out = run(jax.tree.map(lambda leaf: leaf[0], folded), conds)
            out = jax.tree.map(lambda leaf: leaf[None], out)
        else:
            out = jax.lax.map(lambda x: run(x, conds), folded)
        return *jax.tree.map(unfold, out), jnp.full(batch, self.candidates)

    def _evaluate_distinct(
        self, candidates: Array, parent: SvddCarry | None, t: Array, cond: Cond
    ) -> tuple[Array, Any, Array]:
        """The same for one of each kind of candidate; the parent's own kind is known where nothing depends on t."""
        run = lambda x, conds: evaluate(self.process, self.value, self.shared, x, t, conds)  # noqa: E731
        many, batch = candidates.shape[:2]
        tokens = jnp.argmax(candidates, -1)
        first = first_equal(tokens)  # [M, B]
        needed = first == jnp.arange(many)[:, None]
        known = jnp.zeros((many, batch), bool)
        if self.timeless and parent is not None:
            still_masked = t > 0  # at t = 0 a value may be the reward itself: nothing is reused
            known = (tokens == jnp.argmax(parent.x, -1)[None]).reshape(many, batch, -1).all(-1) & still_masked
        flat = lambda leaf: leaf.reshape(many * batch, *leaf.shape[2:])  # noqa: E731
        conds = jax.tree.map(lambda c: jnp.tile(c, (many,) + (1,) * (c.ndim - 1)), cond)
        source = (first * batch + jnp.arange(batch)).reshape(-1)
        out, _ = distinct(run, flat(candidates), conds, source, flat(needed & ~known), self.chunk * batch)
        out = jax.tree.map(lambda leaf: leaf.reshape(many, batch, *leaf.shape[1:]), out)
        if self.timeless and parent is not None:
            reuse = lambda new, old: jnp.where(known.reshape(many, batch, *(1,) * (new.ndim - 2)), old[None], new)  # noqa: E731
            out = jax.tree.map(reuse, out, (parent.value, parent.prediction if self.shared else None))
        return *out, jnp.sum(needed & ~known, axis=0)


def log_soft_weights(values: Array, temperature: Array) -> Array:
    """Return values / temperature with the largest at 0. NaN (infeasible) gives -inf, and a column without a number is uniform.

    The maximum is subtracted first, so that huge values (1e30, inf) do not become NaN.

    Args:
      values: [M, B], in the reward's unit.
      temperature: tau, in the reward's unit.

    Returns:
      [M, B], nats.
    """
    infeasible = jnp.isnan(values)
    values = jnp.where(infeasible, -jnp.inf, values)
    best = jnp.max(values, axis=0, keepdims=True)
    log_weights = jnp.where(values == best, 0.0, (values - best) / temperature)
    return jnp.where(infeasible & ~infeasible.all(axis=0), -jnp.inf, log_weights)


def svdd(
    process: Process,
    denoiser: Denoiser,
    value: Value,
    *,
    temperature: float = 1.0,
    candidates: int = 16,
    chunk: int | None = None,
    selection: str = "soft",
    select_initial: bool = False,
    proposal: Guide | None = None,
    replace: float = 0.0,
    distinct: bool = False,
    timeless: bool = False,
) -> Svdd:
    """Build SVDD, arXiv 2408.08252 algorithm 1: draw M candidates per move, keep one in proportion to exp(v/tau).

    The target is p_pre(x) exp(r(x)/tau)/Z. With the exact soft value, and x_T selected too, the error is of order 1/M. It is
    SVDD-PM with `values.posterior_mean`, and SVDD-MC with `values.learned`.

    Args:
      process: with eta > 0.
      denoiser: of the prior. Where the value is `posterior_mean` of this same object, each candidate costs one network
        call, and the prediction of the one that is kept is used for the next step: M calls a move, not M + 1.
      value: (x, t, cond) -> [B], in the reward's unit.
      temperature: tau in the reward's unit; the target is p_pre(x) exp(r(x)/tau)/Z, up to the distribution of x_T
        (`select_initial`).
      candidates: M.
      chunk: candidates evaluated at once (a divisor of M; all by default, one with `distinct`), to bound memory.
      selection: `soft`, or `argmax`: the best candidate, whatever the temperature.
      select_initial: also select x_T among M draws of the prior. Without it a Gaussian chain tends to prior(x_T) times tilted
        moves, which is the target only where x_T is independent of x0.
      proposal: a guide on the kernel; candidates come from the guided kernel and are weighted by kernel/proposal too
        (algorithm 6), so that the target stays the same.
      replace: fraction of the batch that each move replaces, the lowest values by draws from the whole batch in
        proportion to exp(v/tau) (SVDD-R, algorithm 2); samples then interact, and `samples.info` has their `lineages` [B],
        from which `resampling.standard_error` computes the error of a mean.
      distinct: of a masked process, evaluate equal candidates once. The distribution is the same; the cost falls
        with the number of copies. Examples then share their evaluations, those of one device among themselves.
      timeless: with `distinct`, the denoiser and the value do not depend on t, so that a candidate equal to the present state
        costs no evaluation.

    Returns:
      The sampler.

    Raises:
      ValueError: for eta = 0, M < 1, a chunk that does not divide M, a temperature that is not positive, `distinct`
        of a process that is not masked.

    Note:
      The released code takes the argmax at every step and does not read its temperature; that is
      selection="argmax". A candidate whose value is NaN is never kept while another has a number (info["infeasible"]
      counts them). With `posterior_mean`, chains therefore avoid states whose mean is infeasible, though their x0
      need not be: of N(0, 1) with x0 > 0 infeasible the mean comes out near -0.78, not -0.71. The weights of `smc` correct that.
      The paper's theorem selects the initial draw too, the released code does not. No code of
      SVDD-R is public; the paper resamples globally and reports 3 to 5 % of the samples replaced a step.

    Example:
      >>> import jax, rgdiff
      >>> process = rgdiff.processes.gaussian(rgdiff.schedules.linear_vp(), (1,))
      >>> denoiser = lambda x, t, cond: x * process.schedule.alpha(t)  # N(0, 1)
      >>> value = rgdiff.values.posterior_mean(lambda x0, cond: x0[:, 0], process, denoiser)
      >>> sampler = rgdiff.samplers.svdd(process, denoiser, value, temperature=0.5, candidates=8)
      >>> samples = rgdiff.samplers.sample(sampler, jax.random.key(0), 256, process.times(8))
      >>> 0.5 < float(samples.x0.mean()) < 2.0  # 0 in the prior, 2 in the target
      True
    """
    checks.law(process, "svdd")
    candidates = checks.at_least("candidates", candidates, 1)
    whole = 1 if distinct else candidates
    chunk = whole if chunk is None else checks.at_least("chunk", chunk, 1)
    if candidates % chunk:
        raise ValueError(f"chunk must divide the {candidates} candidates, got {chunk}")
    checks.one_of("selection", selection, SELECTIONS)
    if distinct and not isinstance(process, MaskedProcess):
        raise ValueError("distinct=True needs a masked process: candidates of a continuous one never coincide")
    if timeless and not distinct:
        raise ValueError("timeless=True says which candidates need no evaluation: it needs distinct=True")
    if not 0 <= replace < 1:
        raise ValueError(f"replace must be a fraction of the batch in [0, 1), got {replace!r}")
    denoiser = callable_pytree(denoiser, "a denoiser")
    return Svdd(
        process=process,
        denoiser=denoiser,
        value=callable_pytree(value, "a value"),
        temperature=checks.positive("temperature", temperature),
        proposal=None if proposal is None else callable_pytree(proposal, "a guide"),
        candidates=candidates,
        chunk=chunk,
        selection=selection,
        select_initial=select_initial,
        shared=shares(value, denoiser),
        replace=float(replace),
        distinct=bool(distinct),
        timeless=bool(timeless),
    )
