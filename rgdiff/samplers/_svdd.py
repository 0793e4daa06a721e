"""SVDD: soft value-based decoding (arXiv 2408.08252). Draw M candidates from the kernel, keep one in proportion to exp(v/tau).

It needs no gradient and no training, so the reward may be a black box. The samples do not interact (but
for `replace`). As M grows their distribution tends to p_pre(x) exp(r(x)/tau)/Z when v is the exact soft value and the initial
draw is selected too (a masked chain begins at one state, and needs no selection there), with an error of order 1/M.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    DenoiserLike,
    Guide,
    Info,
    Key,
    Move,
    Process,
    State,
    Value,
    ValueLike,
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
    window: Array | None
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
            return self._choose(key_select, self._keys(key_draw), prior, None, t, cond)
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
        kernel, keys = self.process.reverse(carry.x, t, s, prediction), self._keys(key_draw)

        def select() -> tuple[SvddCarry, Info]:
            if self.proposal is None:
                return self._choose(key_select, keys, kernel, carry, s, cond)
            proposal = self.proposal(kernel, Move(carry.x, t, s, cond, prediction))
            return self._choose(key_select, keys, proposal, carry, s, cond, kernel)

        def draw() -> tuple[SvddCarry, Info]:
            x = jax.tree.map(lambda leaf: leaf[0], _drawn(kernel, None, keys[:1])[0])
            info = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(select)[1])
            info |= {name: jnp.full_like(info[name], jnp.nan) for name in ("value", "values")}
            if "candidates" in info:
                info["candidates"] = jax.tree.map(
                    lambda c, leaf: jnp.broadcast_to(leaf, c.shape), info["candidates"], x
                )
            return carry._replace(x=x, prediction=self.denoiser(x, s, cond) if self.shared else None), info

        return select() if self.window is None else jax.lax.cond(self._selects(t), select, draw)

    def final(self, carry: SvddCarry, t: Array, cond: Cond = None) -> tuple[State, Info]:
        prediction = carry.prediction
        if self.process.projects and not self.shared:
            prediction = self.denoiser(carry.x, t, cond)
        info = {"lineages": carry.lineages} if self.replace else {}
        return self.process.finalize(carry.x, t, prediction), info

    def network_calls(self, moves: int, times: Array | None = None) -> int:
        """Return the largest number of denoiser calls per sample over a chain of `moves` moves (the value's own network not counted).

        With `distinct` there are fewer: info["evaluations"] counts the evaluated states. With a window they depend on the `times`, the
        process' own grid by default.
        """
        if not self.shared:
            return moves + self.process.projects
        first = self.candidates if self.select_initial else 1
        selecting = self._selecting(moves, times)
        each = np.where(selecting, self.candidates, 1)
        return first + int(each.sum()) - (0 if self.process.projects or not selecting[-1] else self.candidates)

    def value_calls(self, moves: int, times: Array | None = None) -> int:
        """Evaluations of the value per sample, at most; on `times` as in `network_calls`."""
        return self.candidates * (int(self._selecting(moves, times).sum()) + self.select_initial)

    def _selects(self, t: Array) -> Array:
        """Whether the move from t selects."""
        if self.window is None:
            return jnp.full(jnp.shape(t), True)
        return (self.window[0] <= t) & (t <= self.window[1])

    def _selecting(self, moves: int, times: Array | None) -> np.ndarray:
        if self.window is None:
            return np.full(moves, True)
        times = self.process.times(moves + self.process.projects) if times is None else times
        return np.asarray(self._selects(times[:-1]))

    def _predict(self, carry: SvddCarry, t: Array, cond: Cond) -> Any:
        if self.shared:
            return carry.prediction
        if carry.stale is None:
            return self.denoiser(carry.x, t, cond)
        again = by_rows(refresh, self.shards, (None, 0, 0, None, 0, 0))
        return again(self.denoiser, carry.prediction, carry.x, t, cond, carry.stale)

    def _keys(self, key: Key) -> Array:
        """The keys of M candidates."""
        return jax.random.split(key, self.candidates)

    def _choose(
        self,
        key: Key,
        keys: Array,
        law: Any,
        parent: SvddCarry | None,
        t: Array,
        cond: Cond,
        kernel: Any = None,
    ) -> tuple[SvddCarry, Info]:
        """Draw M candidates of `law` at time t, weigh them by exp(v/tau) kernel/law, and keep one per example."""
        more: Info = {}
        if self.distinct or self.chunk == self.candidates:
            candidates, log_ratio = _drawn(law, kernel, keys)
            values, predictions, evaluations = self._evaluate(candidates, parent, t, cond)
            noise = self._noise(key, values.shape[1])
            index = jnp.argmax(self._log_weights(values, log_ratio) + noise, axis=0)
            x, prediction = jax.tree.map(functools.partial(_pick, index=index), (candidates, predictions))
            more = {"candidates": candidates} | ({"evaluations": evaluations} if self.distinct else {})
        else:
            index, (x, prediction), values, log_ratio = self._running(key, keys, law, kernel, t, cond)
        log_weights = self._log_weights(values, log_ratio)
        won = _pick(log_weights, index)
        info = {
            "value": _pick(values, index),
            "values": values,
            "log_weights": log_weights,
            "kl": self._selection_kl(log_weights, won) - (0.0 if log_ratio is None else _pick(log_ratio, index)),
            "infeasible": jnp.sum(jnp.isnan(values), axis=0),
            **more,
        }
        lineages = self._lineages(values.shape[1]) if parent is None else parent.lineages
        carry = SvddCarry(x, prediction, info["value"] if self.timeless else None, None, lineages)
        if self.timeless and not self.shared:
            carry = self._keep_prediction(carry, parent, t, cond)
        if self.replace:
            if cond is not None:
                raise ValueError("replace moves samples within the batch, away from their conditions; give replace=0")
            carry, info["value"] = self._resample(jax.random.fold_in(key, 1), carry, info["value"])
        return carry, info

    def _noise(self, key: Key, batch: int) -> Array:
        """Gumbel noise [M, B], whose sum with log-weights has its maximum at a draw in proportion to the weights; 0 for argmax."""
        if self.selection == "soft":
            return jax.random.gumbel(key, (self.candidates, batch), jnp.float32)
        return jnp.zeros((self.candidates, batch), jnp.float32)

    def _log_weights(self, values: Array, log_ratio: Array | None) -> Array:
        log_weights = log_soft_weights(values, self.temperature)
        return log_weights if log_ratio is None else log_weights + log_ratio

    def _running(
        self, key: Key, keys: Array, law: Any, kernel: Any, t: Array, cond: Cond
    ) -> tuple[Array, tuple[State, Any], Array, Array | None]:
        """The same draw, `chunk` candidates at a time, each beside the winner so far: of M, numbers alone are kept.

        By Gumbel-max: a draw in proportion to weights is where log-weight plus noise is largest, and the largest of some is the only one
        of them that may be the largest of all. The law, and with it the sample, is that of all M at once.

        Returns:
          The winner's index [B], its state and prediction, values [M, B], log-ratios [M, B] or None.
        """
        shapes = jax.eval_shape(lambda: _drawn(law, kernel, keys[:1]))[0]
        batch = jax.tree.leaves(shapes)[0].shape[1]
        conds = jax.tree.map(lambda c: jnp.repeat(c, self.chunk, axis=0), cond)
        cut = lambda leaf: leaf.reshape(-1, self.chunk, *leaf.shape[1:])  # noqa: E731
        noise = self._noise(key, batch)
        numbers = jnp.broadcast_to(jnp.arange(self.candidates)[:, None], (self.candidates, batch))

        def evaluated(keys: Array) -> tuple[Any, Array | None, Array]:
            drawn, log_ratio = _drawn(law, kernel, keys)
            rows = jax.tree.map(_by_example, drawn)
            out = evaluate(self.process, self.value, self.shared, rows, t, conds)
            values, predictions = jax.tree.map(lambda leaf: _by_candidate(leaf, self.chunk), out)
            return (drawn, predictions), log_ratio, values

        def better(best: Any, new: Any) -> tuple[Any, Any]:
            keys, noise, numbers = new
            held, log_ratio, values = evaluated(keys)
            ratio = jnp.zeros_like(values) if log_ratio is None else log_ratio
            ahead = jax.tree.map(
                lambda one, more: jnp.concatenate([one[None], more]), best, (held, ratio, values, noise, numbers)
            )
            _, ratios, all_values, gumbel, _ = ahead
            index = jnp.argmax(log_soft_weights(all_values, self.temperature) + ratios + gumbel, axis=0)
            return jax.tree.map(functools.partial(_pick, index=index), ahead), (values, log_ratio)

        # Nobody at first: its noise is -inf, and its value no number.
        blank = jax.eval_shape(lambda: evaluated(keys[: self.chunk])[0])
        held = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), blank)
        nobody = (jnp.full(batch, of, jnp.float32) for of in (0.0, jnp.nan, -jnp.inf))
        none = (held, *nobody, jnp.zeros(batch, numbers.dtype))
        best, kept = jax.lax.scan(better, none, (cut(keys), cut(noise), cut(numbers)))
        values, log_ratio = jax.tree.map(lambda leaf: leaf.reshape(self.candidates, batch), kept)
        return best[4], best[0], values, log_ratio

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
        batch = jax.tree.leaves(candidates)[0].shape[1]
        if self.distinct:
            each = by_rows(type(self)._evaluate_distinct, self.shards, (None, 1, 0, None, 0), (1, 1, 0))
            return each(self, candidates, parent, t, cond)
        run = lambda x, conds: evaluate(self.process, self.value, self.shared, x, t, conds)  # noqa: E731

        conds = jax.tree.map(lambda c: jnp.repeat(c, self.candidates, axis=0), cond)
        out = run(jax.tree.map(_by_example, candidates), conds)
        values, predictions = jax.tree.map(lambda leaf: _by_candidate(leaf, self.candidates), out)
        return values, predictions, jnp.full(batch, self.candidates)

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


def _drawn(law: Any, kernel: Any, keys: Array) -> tuple[State, Array | None]:
    """Draw one candidate a key from a law, [M, B, ...], and return log kernel/law of each, [M, B]; None where they are one."""
    candidates = jax.vmap(without_gradient(law).sample)(keys)
    if kernel is None:
        return candidates, None
    return candidates, jax.vmap(kernel.log_prob)(candidates) - jax.vmap(law.log_prob)(candidates)


def _pick(leaf: Array, index: Array) -> Array:
    """Pick from [M, B, ...] one a column, [B, ...]: per example, so that a batch split over devices stays where it is."""
    return jax.vmap(lambda column, i: column[i], in_axes=(1, 0))(leaf, index)


def _by_example(leaf: Array) -> Array:
    """[M, B, ...] -> [B M, ...]: rows of one example stay together, so that a batch split over devices is evaluated where it lies."""
    return jnp.moveaxis(leaf, 1, 0).reshape(-1, *leaf.shape[2:])


def _by_candidate(leaf: Array, count: int) -> Array:
    """Invert `_by_example`: [B M, ...] -> [M, B, ...]."""
    return jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0)


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
    denoiser: DenoiserLike,
    value: ValueLike,
    *,
    temperature: float = 1.0,
    candidates: int = 16,
    chunk: int | None = None,
    selection: str = "soft",
    select_initial: bool = False,
    proposal: Guide | None = None,
    window: tuple[float, float] | None = None,
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
      chunk: candidates drawn and evaluated at once (a divisor of M; all by default, one with `distinct`). The samples are the same; the
        memory of their states and predictions is that of `chunk` of them whatever M is, and info has no `candidates`. With
        `distinct` only evaluations are so bounded.
      selection: `soft`, or `argmax`: the best candidate, whatever the temperature.
      select_initial: also select x_T among M draws of the prior. Without it a Gaussian chain tends to prior(x_T) times tilted
        moves, which is the target only where x_T is independent of x0.
      proposal: a guide on the kernel; candidates come from the guided kernel and are weighted by kernel/proposal too
        (algorithm 6), so that the target stays the same.
      window: (low, high), the times t whose moves select; the others are the prior's, of one network call and no value. All by default. A
        posterior mean may say little of the reward at early times (`benchmarks.studies.molecules`). May change without a recompilation.
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
        of a process that is not masked, a window that is no pair or is given with `timeless` or `replace`.

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
    if window is not None and (len(window) != 2 or timeless or replace):
        raise ValueError(
            f"window is a pair (low, high) of times whose moves select, without timeless or replace; got {window!r}"
        )
    denoiser = callable_pytree(denoiser, "a denoiser")
    return Svdd(
        process=process,
        denoiser=denoiser,
        value=callable_pytree(value, "a value"),
        temperature=checks.positive("temperature", temperature),
        proposal=None if proposal is None else callable_pytree(proposal, "a guide"),
        window=None if window is None else jnp.asarray(window, jnp.float32),
        candidates=candidates,
        chunk=chunk,
        selection=selection,
        select_initial=select_initial,
        shared=shares(value, denoiser),
        replace=float(replace),
        distinct=bool(distinct),
        timeless=bool(timeless),
    )
