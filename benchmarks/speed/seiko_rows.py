"""The sides of `seiko`: the second of four rounds of SEIKO on images (`digits`) and on masked sequences (`tfbind8`), ours and PyTorch's.

A block is one round from the same state: queries drawn from the current model, the oracle's answers, a bootstrap ensemble
fitted anew to all answers, and inner steps of a new optimiser on the highest head's reward under KL anchors to the prior
and to the last round's model. Ours is `seiko.seiko` as a tuner, one program. As in `benchmarks.speed.rows`, `export` hands over
parameters, random numbers and results, and `check` repeats, each stage on what the last one gave: queries, answers, the
heads' predictions after CHECKED steps of a fit, and the loss and whole gradient of an inner step at parameters that are
neither anchor's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.speed import rows, sequence_rows
from benchmarks.speed.measures import SEED, flat, forward_flops, nested, planned_memory, ready_torch, torch_memory
from benchmarks.speed.rows import Case, gradient_error
from benchmarks.speed.sequence_rows import CLASSES

HEADS, FEATURES, FIT_BATCH, RATE, PRIOR, CLIP = 4, (128, 128), 64, 3e-3, 0.5, 1.0
ROUNDS, LENGTH = 4, 8
CHECKED = 5  # optax corrects AdamW's bias in float32, 6e-6 of the first steps' length, which 20 steps in float64 make 3e-3 of a head
CURRENT, PREVIOUS = 0.95, 1.05  # of the last layer, against the prior's
CONVOLUTIONS: dict[str, Any] = {"out": CLASSES, "width": 48, "dilations": (1, 1, 1), "kernel": 5}


@dataclasses.dataclass(frozen=True)
class Round:
    """The numbers of a round, those of configs/seiko_digits.yaml and seiko_tfbind8.yaml but for fewer steps, and fewer images a step.

    `calls` of the network a sample; `steps` of `batch` samples with AdamW's `rate` and `b2`; `fit_steps` of the ensemble.
    """

    queries: int
    calls: int
    batch: int
    steps: int
    fit_steps: int
    alpha: float
    rate: float
    b2: float


SETTINGS = {
    "digits": Round(queries=64, calls=15, batch=16, steps=4, fit_steps=40, alpha=0.2, rate=3e-4, b2=0.999),
    "tfbind8": Round(queries=100, calls=LENGTH, batch=128, steps=50, fit_steps=133, alpha=0.1, rate=2e-3, b2=0.99),
}


def answers() -> np.ndarray:
    """The oracle of sequences: a random value of each of them, [K^L]."""
    return np.random.default_rng(SEED).uniform(-0.5, 0.5, CLASSES**LENGTH).astype(np.float32)


class Images:
    """Our chain on images: DRaFT-K of a U-Net that predicts v, ancestral."""

    last = "conv_out"

    def __init__(self, case: Case):
        import jax.numpy as jnp

        from rgdiff import processes, schedules
        from rgdiff.nets import UNet
        from rgdiff.recipes.priors import PriorModel

        self.case, self.oracle = case, rows.reward
        self.net = UNet(channels=rows.CHANNELS)
        self.process = processes.gaussian(schedules.cosine_vp(), (rows.SIDE, rows.SIDE, 1))
        self.model = PriorModel(self.process.schedule, self.net, "v")
        self.x = jnp.zeros((SETTINGS["digits"].batch, rows.SIDE, rows.SIDE, 1))

    def inner(self, reward: Any, times: Any, optimizer: Any, **options: Any) -> Any:
        from rgdiff import tuners

        return tuners.draft_k(self.model, self.process, reward, times, optimizer, k=self.case.live, **options)

    def random(self, key: Any, batch: int, moves: int) -> dict[str, Any]:
        """What a chain draws: x_T and the noise of its moves."""
        import jax

        draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (batch, *self.x.shape[1:]))  # noqa: E731
        return {"x": draw(0), "noise": jax.vmap(draw)(1 + jax.numpy.arange(moves))}

    def calls(self, setting: Round) -> int:
        """Forward passes of an inner step, of one example: each call, its gradient, both anchors, and their input's gradient."""
        return setting.calls * (3 + 2) + 2 * self.case.live


class Sequences:
    """Our chain on sequences: the log-variance gradient of DRAKES, one position a move."""

    last = "out"

    def __init__(self, case: Case):
        import jax.numpy as jnp

        from rgdiff import denoisers, processes, schedules
        from rgdiff.exact import enumeration
        from rgdiff.nets import ConvNet1D

        table = jnp.asarray(answers())
        self.oracle = lambda x0, cond=None: table[enumeration.codes(x0)]
        self.net = ConvNet1D(**CONVOLUTIONS)
        self.process = processes.first_hitting(processes.masked(schedules.log_linear_mask(), LENGTH, CLASSES))
        self.model = denoisers.LinenModel(self.net)
        self.x = jnp.zeros((SETTINGS["tfbind8"].batch, LENGTH, CLASSES + 1))

    def inner(self, reward: Any, times: Any, optimizer: Any, **options: Any) -> Any:
        from rgdiff import tuners

        return tuners.drakes(self.model, self.process, reward, times, optimizer, estimator="log_variance", **options)

    def random(self, key: Any, batch: int, moves: int) -> dict[str, Any]:
        """What a chain draws: the Gumbel numbers of the next position and of its token, of every move."""
        import jax

        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(1 + jax.numpy.arange(moves))
        place = jax.vmap(lambda k: jax.random.gumbel(k, (batch, LENGTH)))(keys[:, 0])
        return {"place": place, "token": jax.vmap(lambda k: jax.random.gumbel(k, (batch, LENGTH, CLASSES)))(keys[:, 1])}

    def calls(self, setting: Round) -> int:
        return setting.calls * (3 + 2)


class Ours:
    """Our side of a case, on JAX's default device."""

    note = ""

    def __init__(self, case: Case):
        import jax

        from rgdiff import seiko, surrogates, tuners
        from rgdiff.nets import ValueMLP

        jax.config.update("jax_default_matmul_precision", "highest")  # float32 on both sides, on every device
        self.jax, self.setting = jax, SETTINGS[case.method]
        self.chain = chain = (Images if case.method == "digits" else Sequences)(case)
        setting, process = self.setting, chain.process
        self.prior = sequence_rows.draw(chain.net, chain.x)
        times = process.times(setting.calls)
        optimizer = tuners.adamw(setting.rate, b2=setting.b2, clip=CLIP)
        self.head = ValueMLP(FEATURES)
        options: dict[str, Any] = {"heads": HEADS, "steps": setting.fit_steps, "batch": FIT_BATCH, "prior": PRIOR}
        self.seiko = seiko.seiko(
            chain.model,
            process,
            times,
            surrogates.ensemble(self.head, tuners.adamw(RATE, clip=CLIP), **options),
            lambda reward, **anchors: chain.inner(
                reward, times, optimizer, batch=setting.batch, remat="none", **anchors
            ),
            prior=chain.model(self.prior),
            temperature=setting.alpha,
            batch=setting.queries,
            capacity=ROUNDS * setting.queries,
            steps=setting.steps,
        )
        self.tuner = tuners.as_tuner(self.seiko, chain.oracle)
        state = self.seiko.init(self.prior)
        state = self.told(state, self.ask(self.seiko, jax.random.key(SEED + 1), state))
        self.state = state._replace(params=self.scaled(PREVIOUS), step=state.step + 1)

    @functools.cached_property
    def ask(self) -> Any:
        return self.jax.jit(lambda method, key, state: method.rollout(key, state))

    def told(self, state: Any, queries: Any) -> Any:
        return self.seiko.tell(state, queries, self.chain.oracle(queries.x0))[0]

    def scaled(self, factor: float) -> Any:
        """The prior's parameters with another last layer."""
        last = self.prior[self.chain.last]
        return self.prior | {self.chain.last: last | {"kernel": factor * last["kernel"]}}

    @functools.cached_property
    def program(self) -> Any:
        """The compiled block: (tuner, key, state) -> (state, info)."""
        step = self.jax.jit(lambda tuner, key, state: tuner.step(key, state))
        return step.lower(self.tuner, self.jax.random.key(SEED), self.state).compile()

    @functools.cached_property
    def flops(self) -> float:
        """Of the queries, the inner steps and the fit, each from forward passes as XLA counts them; a gradient is two of them.
        The heads' predictions outside the fit are left out."""
        setting, chain, jnp = self.setting, self.chain, self.jax.numpy
        forward = lambda params, x: chain.net.apply({"params": params}, x, jnp.float32(0))  # noqa: E731
        call = forward_flops(forward, self.prior, chain.x) / setting.batch
        x0 = self.state.observations.x0[:FIT_BATCH]
        params = self.head.lazy_init(self.jax.random.key(0), x0, jnp.float32(0))["params"]
        head = forward_flops(lambda params, x: self.head.apply({"params": params}, x, jnp.float32(0)), params, x0)
        inner = setting.steps * setting.batch * chain.calls(setting)
        return (setting.queries * setting.calls + inner) * call + 3 * HEADS * setting.fit_steps * head

    def block(self, seed: int) -> None:
        self.jax.block_until_ready(self.program(self.tuner, self.jax.random.key(seed), self.state))

    def memory(self) -> dict[str, float]:
        return planned_memory(self.program, lambda: self.block(0))

    def export(self) -> dict[str, Any]:
        """Parameters, the answers so far, and of every stage its random numbers and what came out."""
        jax, setting, chain = self.jax, self.setting, self.chain
        surrogate = dataclasses.replace(self.seiko.surrogate, steps=CHECKED)
        key_ask, key_fit, key_step = jax.random.split(jax.random.key(SEED + 2), 3)
        queries = self.ask(self.seiko, key_ask, self.state)
        told = self.told(self.state, queries)
        fitted = dataclasses.replace(self.seiko, surrogate=surrogate)
        told = jax.jit(lambda method, key, state: method.refit(key, state))(fitted, key_fit, told)
        belief, current = told.belief, self.scaled(CURRENT)
        known = told.observations._replace(
            **{n: getattr(told.observations, n)[: 2 * setting.queries] for n in ("y", "status")},
            x0=told.observations.x0[: 2 * setting.queries],
        )
        predictions = (belief.predictions(known.x0) - belief.heads.offset) / belief.heads.scale
        first, drawn = self._drawn(jax.random.split(key_fit)[0], told.observations)
        tuner, anchors = self.seiko.tuner(told), self.seiko.weights(told)
        grad = jax.jit(jax.value_and_grad(lambda params, tuner, key: tuner.loss(params, key)[0]))
        loss, gradients = grad(current, tuner, key_step)
        moves = self.seiko.times.shape[0] - 1
        out = flat(self.prior, "prior") | flat(self.state.params, "previous") | flat(current, "current")
        out |= flat(first["mlp"], "first") | flat(belief.heads.prior_params["mlp"], "fixed")
        out |= {"x": known.x0, "y": known.y, "rows": drawn, "predictions": predictions, "anchors": anchors}
        out |= flat(chain.random(key_ask, setting.queries, moves), "asking")
        out |= flat(chain.random(jax.random.split(key_step)[0], setting.batch, moves), "tuning")
        out |= {"loss": loss} | {f"gradient/{i:04d}": g for i, g in enumerate(jax.tree.leaves(gradients))}
        if isinstance(chain, Images):
            out["table"] = rows.table(self.seiko.process, self.seiko.times)
        return {name: np.asarray(value) for name, value in out.items()}

    def _drawn(self, key: Any, observations: Any) -> tuple[Any, Any]:
        """The heads' first parameters and the rows [CHECKED, H, B] of their fit, as `Ensemble.fit` and its steps draw them."""
        jax, jnp = self.jax, self.jax.numpy
        from rgdiff.surrogates import networks

        key_init, _, key_resample, key_fit = (jax.random.split(k, HEADS) for k in jax.random.split(key, 4))

        def rows(key: Any, counts: Any, step: Any) -> Any:
            key = jax.random.split(jax.random.fold_in(key, step))[1]
            ticket = jax.random.randint(key, (FIT_BATCH,), 0, counts.sum())
            return jnp.searchsorted(jnp.cumsum(counts), ticket, side="right")

        first = jax.vmap(lambda k: networks.initial(k, self.head, observations.x0))(key_init)
        counts = jax.vmap(networks.bootstrap, (0, None))(key_resample, observations.answered)
        return first, jax.vmap(lambda i: jax.vmap(rows, (0, 0, None))(key_fit, counts, i))(jnp.arange(CHECKED))


class Torch:
    """PyTorch's side of a case, eager or compiled, on CUDA where there is one."""

    def __init__(self, case: Case, given: dict[str, Any], compiled: bool, threads: int, mode: str | None):
        from benchmarks.speed import torch_seiko, torch_sequences, torch_twins

        self.torch, self.twins, self.case, self.given = ready_torch(threads), torch_twins, case, given
        self.setting, self.device = SETTINGS[case.method], torch_twins.device()
        tensor = lambda a: self.torch.tensor(np.asarray(a), device=self.device)  # noqa: E731
        images = case.method == "digits"

        def net() -> Any:
            if images:
                return torch_twins.UNet(rows.CHANNELS).to(self.device)
            network = torch_sequences.ConvNet1D(CLASSES + 1, **CONVOLUTIONS, channels_last=case.channels_last)
            return network.to(self.device)

        self.params = {name: nested(given, name) for name in ("prior", "previous", "current")}
        in_turn = ("previous", "prior", "previous")
        tuned, prior, previous = (torch_twins.load_linen(net(), self.params[name]) for name in in_turn)
        adamw = {"lr": self.setting.rate, "betas": (0.9, self.setting.b2)}
        shared = (tuned, (prior, previous), given["anchors"].tolist(), adamw, CLIP)
        how: dict[str, Any] = {"compiled": compiled, "mode": mode}
        if images:
            shape = (1, rows.SIDE, rows.SIDE)
            self.tuning: Any = torch_seiko.Images(*shared, table=given["table"], shape=shape, live=case.live, **how)
            self.oracle: Any = torch_twins.reward
        else:
            self.tuning = torch_seiko.Sequences(*shared, length=LENGTH, classes=CLASSES, **how)
            table = tensor(answers())
            powers = tensor([CLASSES**i for i in reversed(range(LENGTH))])
            self.oracle = lambda x: table[(x * powers).sum(1)]
        stacked = [
            {name.removeprefix(f"{part}/"): tensor(a) for name, a in given.items() if name.startswith(f"{part}/")}
            for part in ("first", "fixed")
        ]
        self.ensemble = torch_seiko.Ensemble(*stacked, prior=PRIOR, rate=RATE, clip=CLIP, **how)
        self.x, self.y = tensor(given["x"]).flatten(1), tensor(given["y"])

    def reward(self, x: Any) -> Any:
        return self.ensemble.upper(self.tuning.features(x))

    def check(self) -> float:
        """The largest relative error of a stage's result, or of tokens the fraction that differs."""
        torch, given, count = self.torch, self.given, self.setting.queries
        put = self.twins.images if self.case.method == "digits" else functools.partial(torch.tensor, device=self.device)
        numbers = lambda stage: {name: put(a) for name, a in nested(given, stage).items()}  # noqa: E731
        relative = lambda got, want: float((got - want).norm() / want.norm())  # noqa: E731
        x0 = self.tuning.queries(count, **numbers("asking"))
        asked = relative(self.tuning.features(x0), self.x[count:])
        told = relative(self.oracle(x0), self.y[count:])
        self.ensemble.fit(self.x, self.y, torch.tensor(given["rows"].astype(np.int64), device=self.device))
        with torch.no_grad():
            fitted = relative(
                self.ensemble.standardised(self.x), torch.tensor(given["predictions"], device=self.device)
            )
        self.twins.load_linen(self.tuning.net, self.params["current"])
        loss = self.tuning.loss(self.setting.batch, self.reward, **numbers("tuning"))
        loss.backward()
        got = self.twins.in_our_order(self.tuning.net, self.params["current"], lambda p: p.grad)
        self.tuning.net.zero_grad(set_to_none=True)
        return max(asked, told, fitted, gradient_error(loss.item(), got, given))

    def block(self, seed: int, batch: int | None = None) -> None:
        torch, setting = self.torch, self.setting
        count = batch or setting.queries
        self.tuning.restart()
        x0 = self.tuning.queries(count)
        x = torch.cat([self.x[: setting.queries], self.tuning.features(x0)])
        y = torch.cat([self.y[: setting.queries], self.oracle(x0)])
        resample = torch.randint(len(y), (HEADS, len(y)), device=self.device)
        ticket = torch.randint(len(y), (HEADS, setting.fit_steps * FIT_BATCH), device=self.device)
        rows = resample.gather(1, ticket).view(HEADS, setting.fit_steps, FIT_BATCH)
        self.ensemble.fit(x, y, rows.transpose(0, 1))
        self.tuning.improve(setting.steps, batch or setting.batch, self.reward)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        return torch_memory(self.block)
