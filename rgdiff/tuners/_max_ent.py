"""The engine of `dxdp` and `dxmi`: a few-step policy against learnt costs to go, one iteration a compiled program.

An iteration draws chains, follows their speeds, sweeps values from data to noise, and takes one reparameterised step of the
policy through one move: no gradient passes along a chain. Costs are summed over an example, in the energy's unit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rgdiff import checks, rewards
from rgdiff.kernels import Gaussian
from rgdiff.samplers._loop import roll
from rgdiff.shards import Shards, bound, split, spread, value_and_grad
from rgdiff.tuners._loop import TrainState
from rgdiff.tuners.ema import ema_update
from rgdiff.typing import Array, Cond, Info, Key, Params, Process, State, Value, pytree, shown, static
from rgdiff.values import evaluate

SWEEPS = ("gauss_seidel", "jacobi")
EXPECTATIONS = ("exact", "sampled")


class Paths(NamedTuple):
    """Chains as the policy drew them: states x [T + 1, B, ...] and the laws [T, B, ...] they were drawn from."""

    x: State
    kernels: Gaussian


class MaximumEntropyExtra(NamedTuple):
    """Beside parameters: speeds s_t^2 [T], squared data units, the first ones, and the target network (or None)."""

    speed: Array
    first: Array
    target: Params | None


class Rates(NamedTuple):
    """Learning rates of Adam: of the policy's network and its log sigma, of the value, and of a separate energy."""

    policy: Array
    sigma: Array
    value: Array
    energy: Array


class Ablation(NamedTuple):
    """Options in which the papers' versions of the algorithm differ; the defaults are ours. All of them shape the program.

    sweep: `gauss_seidel`, T steps of Adam from data to noise, each target with the values just learnt; or `jacobi`, one
      step for all moves with targets of the old values. sweeps: how many of them an iteration.
    expectation: `exact` takes the expectation of |y - x|^2 over the noise in closed form, `sampled` does not.
    resample: targets at fresh draws of y, not at the chain's own.
    regularized_values: targets with the costs of steps; without, V_t is the expected end, as released.
    timeless: V is evaluated at t = 0 throughout: one function of x.
    every_move: the policy learns from all T B transitions, not from one move of each chain, moves in equal shares.
    """

    sweep: str = "gauss_seidel"
    sweeps: int = 1
    expectation: str = "exact"
    resample: bool = True
    regularized_values: bool = True
    timeless: bool = False
    every_move: bool = False

    def checked(self) -> Ablation:
        """Refuse unknown names and counts below 1."""
        checks.one_of("ablation.sweep", self.sweep, SWEEPS)
        checks.at_least("ablation.sweeps", self.sweeps, 1)
        checks.one_of("ablation.expectation", self.expectation, EXPECTATIONS)
        return self


@pytree
class _Walk:
    """The chain of a policy, keeping the law of every step."""

    process: Process
    denoiser: Any

    def init(self, key: Key, batch: int, t: Array, cond: Cond = None) -> Array:
        return self.process.prior(batch).sample(key)

    def step(self, key: Key, x: Array, t: Array, s: Array, cond: Cond = None) -> tuple[Array, Info]:
        kernel = self.process.reverse(x, t, s, self.denoiser(x, t, cond))
        return kernel.sample(key), {"kernel": kernel}

    def final(self, x: Array, t: Array, cond: Cond = None) -> tuple[Array, Info]:
        return self.process.finalize(x, t, None), {}


@pytree
class Togo:
    """The cost to go (x, t, cond) -> [B]: a value for t > 0, an energy (x0, cond) -> [B] at t = 0 where there is one of its own."""

    value: Value
    energy: Any
    timeless: bool = static(default=False)

    def __call__(self, x: State, t: Array, cond: Cond = None) -> Array:
        value = lambda: evaluate(self.value, x, 0.0 * t if self.timeless else t, cond).astype(jnp.float32)  # noqa: E731
        if self.energy is None:
            return value()
        energy = lambda: self.energy(x, cond).astype(jnp.float32)  # noqa: E731
        return jax.lax.cond(t > 0, value, energy) if jnp.ndim(t) == 0 else jnp.where(t > 0, value(), energy())


@pytree
class MaximumEntropy:
    """The engine of `dxdp` and `dxmi`. Parameters and optimiser states are dicts: "policy", "value", and maybe "energy"."""

    model: Any
    process: Process
    value: Any
    reward: Any
    times: Array
    temperature: Array
    velocity_temperature: Array
    time_cost: Array
    rates: Rates
    decay_steps: Array
    warmup: Array
    clip: Array
    velocity_decay: Array
    speed: Array | None
    ema_decay: Array | None
    target_decay: Array | None
    limit: Array
    optimizer: Any = static()
    batch: int = static()
    ablation: Ablation = static(default=Ablation())
    shards: Shards | None = static(default=None)

    advice = "lower the rates, or see that the reward is finite wherever chains may end (jnp.maximum(reward, a floor))"

    # ------------------------------------------------------------ what others use

    def init(self, params: Params) -> TrainState:
        """Begin from {"policy": ..., "value": ...}, copied; speeds are those of 4,096 chains where none were given."""
        if not isinstance(params, dict) or not {"policy", "value"} <= set(params):
            raise ValueError(f'params must be a dict {{"policy": ..., "value": ...}}, got {shown(params)}')
        params = jax.tree.map(lambda p: jnp.array(p, copy=True), checks.params(params))
        copy = lambda: jax.tree.map(jnp.array, params)  # noqa: E731
        if self.speed is None:
            speed = self._squares(self.rollout(jax.random.key(0), params["policy"], 4096))
        else:
            speed = jnp.array(self.speed, copy=True)  # a training loop donates its state
        target = None if self.target_decay is None else copy()
        opt_state = {name: self.optimizer.init(part) for name, part in params.items()}
        average = None if self.ema_decay is None else copy()
        return TrainState(
            params, opt_state, average, jnp.int32(0), jnp.int32(0), MaximumEntropyExtra(speed, speed + 0.0, target)
        )

    def togo(self, params: Params) -> Togo:
        """The cost to go of a state's parameters, a value with lower = better: minus the reward, or the energy, at t = 0."""
        energy = None if self.reward is None else self._minus_reward
        return Togo(bound(self.value, params["value"], "a value"), energy, self.ablation.timeless)

    def rollout(self, key: Key, policy: Params, batch: int, cond: Cond = None) -> Paths:
        """Draw chains without gradients."""
        walk = _Walk(self.process, bound(self.model, policy, "a denoiser"))
        first = split(walk.init(jax.random.fold_in(key, 0), batch, self.times[0]), self.shards)
        _, (later, kernels) = roll(
            walk, key, first, self.times, cond, keep=lambda x, info: jax.lax.stop_gradient((x, info["kernel"]))
        )
        return Paths(jnp.concatenate([first[None], later]), kernels)

    def step(self, key: Key, state: TrainState, batch: Any = None) -> tuple[TrainState, Info]:
        """Take one iteration; batch is None, or {"cond": ...} with B rows."""
        key_path, key_value, key_policy = jax.random.split(key, 3)
        cond = None if batch is None else batch.get("cond")
        paths = self.rollout(key_path, state.params["policy"], self.batch, cond)
        speed = self._follow(state.extra.speed, paths)
        carry = state.params, state.opt_state
        carry, info, energetic = self._learn_energy(carry, state.step, paths, batch, cond)
        carry, more = self._learn_values(key_value, carry, state, paths, speed, cond)
        carry, last = self._improve(key_policy, carry, state.step, paths, speed, cond)
        return self._end(state, carry, speed, energetic, info | more | last | self._pace(speed, paths))

    def network_calls(self) -> int:
        """Calls of the tuned denoiser per chain and iteration, forward passes only."""
        moves = self.times.shape[0] - 1
        return moves + (moves if self.ablation.every_move else 1)

    # ------------------------------------------------------------ the parts of an iteration

    def cost(self, kernel: Gaussian, x: Array, y: Array, speed: Array) -> Array:
        """Return the cost of a step, [B], in energy: tau nats of KL(pi(y | x) | N(x, s^2)), its quadratic part at a weight of its own.

        velocity_temperature E|y - x|^2 / 2 s^2 - tau (H(pi) - D/2 log 2 pi s^2); `exact` takes the expectation, else y stands for it.
        """
        flat = lambda a: jnp.sum(a.reshape(a.shape[0], -1), -1)  # noqa: E731
        size = math.prod(x.shape[1:])
        square = flat((kernel.mean - x) ** 2) + size * jnp.mean(kernel.std**2, axis=tuple(range(1, x.ndim)))
        square = square if self.ablation.expectation == "exact" else flat((y - x) ** 2)
        entropy = kernel.entropy() - 0.5 * size * jnp.log(2 * jnp.pi * speed)
        return self.velocity_temperature * square / (2 * speed) - self.temperature * entropy

    def _squares(self, paths: Paths) -> Array:
        """E |x_{t+1} - x_t|^2 / D of every move, [T]."""
        mean = lambda a: jnp.mean(a.reshape(a.shape[0], -1), -1)  # noqa: E731
        if self.ablation.expectation == "sampled":
            return mean((paths.x[1:] - paths.x[:-1]) ** 2)
        return mean((paths.kernels.mean - paths.x[:-1]) ** 2) + mean(paths.kernels.std**2)

    def _follow(self, speed: Array, paths: Paths) -> Array:
        return self.velocity_decay * speed + (1 - self.velocity_decay) * self._squares(paths)

    def _pace(self, speed: Array, paths: Paths) -> Info:
        return {"running_cost": jnp.mean(self._squares(paths) / (2 * speed))}

    def _learn_energy(self, carry: Any, step: Array, paths: Paths, batch: Any, cond: Cond) -> tuple[Any, Info, Array]:
        """Nothing to learn: the energy is minus the reward."""
        x0 = self.process.finalize(paths.x[-1], self.times[-1], None)
        return carry, {"reward": jnp.mean(rewards.evaluate(self.reward, x0, cond))}, jnp.bool_(True)

    def _learn_values(
        self, key: Key, carry: Any, state: TrainState, paths: Paths, speed: Array, cond: Cond
    ) -> tuple[Any, Info]:
        """Regress V_t on V_{t+1} of a next state plus the step's cost; one step of Adam per move, data end first, or one for all."""
        params, opt_state = carry
        moves = self.times.shape[0] - 1
        rate = self._rate(self.rates.value, state.step)

        def goal(value: Params, key: Key, x: Array, y: Array, kernel: Gaussian, s: Array, speed: Array, extra: Array):
            y = kernel.sample(key) if self.ablation.resample else y
            source = params | {"value": value} if state.extra.target is None else state.extra.target
            cost = self.cost(kernel, x, y, speed) if self.ablation.regularized_values else 0.0
            return jax.lax.stop_gradient(self.togo(source)(y, s, cond) + cost + extra)

        def loss(value: Params, x: Array, t: Array, goals: Array) -> Array:
            return jnp.mean((self.togo(params | {"value": value})(x, t, cond) - goals) ** 2)

        def descend(value: Params, opt: Any, gradients: Params) -> tuple[Params, Any]:
            return self._descend(value, opt, gradients, rate)

        def one(inner: tuple[Params, Any], where: Any) -> tuple[tuple[Params, Any], Array]:
            (value, opt), (t, x, *rest) = inner, where
            grad = value_and_grad(loss, self.shards)
            error, gradients = grad(value, x, t, goal(value, rest[0], x, *rest[1:]))
            return descend(value, opt, gradients), error

        def sweep(inner: tuple[Params, Any], key: Key) -> tuple[tuple[Params, Any], Array]:
            keys = jax.random.split(key, moves)
            rest = (keys, paths.x[1:], paths.kernels, self.times[1:], speed, self.time_cost)
            where = (self.times[:-1], paths.x[:-1], *rest)
            if self.ablation.sweep == "gauss_seidel" and moves > 1:
                return jax.lax.scan(one, inner, where, reverse=True)
            if moves == 1:  # see samplers._loop.roll
                inner, error = one(inner, jax.tree.map(lambda leaf: leaf[0], where))
                return inner, error[None]
            value, opt = inner
            goals = jax.vmap(lambda x, *rest: goal(value, rest[0], x, *rest[1:]))(paths.x[:-1], *rest)
            each = lambda value: jax.vmap(lambda t, x, y: loss(value, x, t, y))(self.times[:-1], paths.x[:-1], goals)  # noqa: E731

            def every(value: Params) -> tuple[Params, Array]:
                errors, back = jax.vjp(each, value)
                return back(jnp.ones_like(errors))[0], errors

            gradients, errors = spread(every, self.shards)(value)
            return descend(value, opt, gradients), errors

        inner = params["value"], opt_state["value"]
        for one_key in jax.random.split(key, self.ablation.sweeps):
            inner, errors = sweep(inner, one_key)
        params, opt_state = params | {"value": inner[0]}, opt_state | {"value": inner[1]}
        return (params, opt_state), {"loss": jnp.mean(errors)}

    def policy_loss(
        self, policy: Params, key: Key, params: Params, paths: Paths, speed: Array, shift: Array, cond: Cond = None
    ) -> Array:
        """Mean over transitions of V_{t+1}(y) + the step's cost, y ~ pi reparameterised.

        Every move takes its share of the chains, one of every T, others at every iteration (`shift`), or all of them. One move at a
        time, so that a network embeds its time once.
        """
        moves, batch = self.times.shape[0] - 1, paths.x.shape[1]
        denoiser, togo = bound(self.model, policy, "a denoiser"), self.togo(params)

        def share(tree: Any, move: Array) -> Any:
            turn = (move + shift) % moves
            if self.ablation.every_move or moves == 1:
                return tree
            if batch % moves:
                chosen = (moves * jnp.arange(-(-batch // moves)) + turn) % batch
                return jax.tree.map(lambda leaf: leaf[chosen], tree)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, moves, *leaf.shape[1:])[:, turn], tree)

        def one(key: Key, move: Array, t: Array, s: Array, x: Array, speed: Array) -> Array:
            x, some = share((x, cond), move)
            kernel = self.process.reverse(x, t, s, denoiser(x, t, some))
            y = kernel.rsample(key)
            return jnp.mean(togo(y, s, some) + self.cost(kernel, x, y, speed))  # type: ignore[arg-type]

        where = (jax.random.split(key, moves), jnp.arange(moves), self.times[:-1], self.times[1:], paths.x[:-1], speed)
        return jnp.mean(jax.vmap(one)(*where))

    def _improve(self, key: Key, carry: Any, step: Array, paths: Paths, speed: Array, cond: Cond) -> tuple[Any, Info]:
        """One step of the policy, its gradient clipped; none during the warm-up."""
        import optax

        params, opt_state = carry
        grad = value_and_grad(self.policy_loss, self.shards)
        loss, gradients = grad(params["policy"], key, params, paths, speed, step, cond)
        norm = optax.tree.norm(gradients)
        shrink = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
        gradients = jax.tree.map(lambda g: (shrink * g).astype(g.dtype), gradients)
        rates = self._rate(self.rates.policy, step)
        if isinstance(params["policy"], dict) and "log_sigma" in params["policy"]:
            rates = dict.fromkeys(params["policy"], rates) | {"log_sigma": self._rate(self.rates.sigma, step)}
        new = self._descend(params["policy"], opt_state["policy"], gradients, rates)
        policy, opt = _either(step >= self.warmup, new, (params["policy"], opt_state["policy"]))
        info = {"policy_loss": loss, "gradient_norm": norm}
        return (params | {"policy": policy}, opt_state | {"policy": opt}), info

    def _end(
        self, state: TrainState, carry: Any, speed: Array, energetic: Array, info: Info
    ) -> tuple[TrainState, Info]:
        """Keep the iteration, or, where it diverges, all that was before it: not finite, or speeds or energies out of bounds."""
        params, opt_state = carry
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, speed, info))]))
        bounded = jnp.all(speed <= self.limit**2 * state.extra.first) & energetic
        good = finite & bounded
        average, target = state.average, state.extra.target
        if average is not None:
            average = ema_update(average, params, self.ema_decay, state.step)  # type: ignore[arg-type]
        if target is not None:
            target = ema_update(target, params, self.target_decay)  # type: ignore[arg-type]
        extra = MaximumEntropyExtra(speed, state.extra.first, target)
        kept = _either(
            good, (params, opt_state, average, extra), (state.params, state.opt_state, state.average, state.extra)
        )
        skipped = state.skipped + jnp.where(good, 0, 1).astype(jnp.int32)
        new = TrainState(kept[0], kept[1], kept[2], state.step + 1, skipped, kept[3])
        return new, info | {"skipped": skipped, "diverged": (~good).astype(jnp.int32)}

    # ------------------------------------------------------------ small things

    def _minus_reward(self, x: State, cond: Cond = None) -> Array:
        return -rewards.evaluate(self.reward, self.process.finalize(x, self.times[-1], None), cond)

    def _rate(self, rate: Array, step: Array) -> Array:
        """Cosine decay to 0 at decay_steps."""
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / self.decay_steps, 1.0)))

    def _descend(self, params: Params, opt_state: Any, gradients: Params, rates: Any) -> tuple[Params, Any]:
        """One step of the optimiser (a scaling of gradients), times the rate: a number, or one per entry of a dict."""
        updates, opt_state = self.optimizer.update(gradients, opt_state, params)
        if isinstance(rates, dict):
            return {name: _minus(params[name], updates[name], rates[name]) for name in params}, opt_state
        return _minus(params, updates, rates), opt_state


def _minus(params: Params, updates: Params, rate: Array) -> Params:
    return jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)


def _either(which: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(which, n, o), new, old)
