"""Methods of recipes that spend a budget of queries: SEIKO and its baselines, each a campaign (`rgdiff.runtime.campaign`).

The task's reward stands for the expensive oracle: it is called at the queries alone, with noise, and NaN is an infeasible answer.
Its noiseless values evaluate every round's model, outside the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, guides, metrics, samplers, seiko, surrogates, values
from rgdiff.processes import MaskedProcess
from rgdiff.recipes.methods.tuning import FineTuning
from rgdiff.recipes.outcome import draw, draw_with_kl, nothing, outcome
from rgdiff.recipes.priors import unconditional
from rgdiff.recipes.typing import Method, Outcome, Prior, ReadyPrior, Shape
from rgdiff.rewards import HostReward, Task, score
from rgdiff.runtime.campaign import Campaign
from rgdiff.runtime.distributed import shared_array
from rgdiff.runtime.run import Run
from rgdiff.typing import Process

STEERING = ("svdd", "smc", "guidance", "best_of_n")
OPTIMISM = ("upper", "mean", "thompson")
SHOWN = {
    "reward": "reward of the model's samples, by queries",
    "infeasible": "infeasible share of the model's samples, by queries",
    "kl": "path KL to the prior, by queries",
    "diversity": "diversity of the model's samples, by queries",
    "best": "best answer so far, by queries",
    "bonus": "bonus at the queries, before their answers",
    "covered": "share of a round's answers within 1.96 deviations of their prediction, noise included, before they are seen",
}


@dataclasses.dataclass(frozen=True)
class QueryRounds(Method):
    """Rounds of queries, refits and better models (`rgdiff.seiko.seiko`).

    Args:
      surrogate: from `rgdiff.surrogates`.
      queries: number of queries of every round; one round is the non-adaptive baseline.
      tuning: settings of the inner tuner (a reward gradient), its `steps` those of a round; its temperature is not used.
      steering: svdd, smc, guidance or best_of_n steer the prior's chain by the optimistic reward instead.
      options: of that sampler; for best_of_n `candidates`, and for smc `particles` per sample too.
      optimism: `upper`; `mean` is greedy; `thompson` takes one draw of the posterior a round.
      temperature, proximal_weight, schedule: alpha, beta and its schedule, in the reward's unit per nat; for steering the
        sampler's temperature alone.
      feasibility, feasibility_weight: a classifier from `rgdiff.surrogates` and the weight of its log-probability.
      noise: standard deviation of an answer, reward's unit.
      seeds: campaigns, shown as bands from the lowest to the highest.
      evaluate: samples that evaluate a round's model.
    """

    surrogate: Any
    queries: Sequence[int] = (64, 64, 64, 64)
    tuning: FineTuning | None = None
    steering: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimism: str = "upper"
    temperature: float = 0.1
    proximal_weight: float | None = None
    schedule: str = "linear"
    feasibility: Any = None
    feasibility_weight: float = 0.0
    noise: float = 0.0
    seeds: int = 1
    evaluate: int = 256

    def check(self, prior: Prior, shape: Shape) -> None:
        unconditional(prior, "a campaign of queries", "choose a prior without labels")
        if isinstance(self.queries, int) or not len(self.queries):
            raise ValueError(f"queries is a list, how many in every round, e.g. [64, 64, 64, 64]; got {self.queries!r}")
        for count in self.queries:
            checks.at_least("queries", count, 1)
        if (self.tuning is None) == (self.steering is None):
            raise ValueError(f"give one of tuning (settings of a reward gradient) and steering ({', '.join(STEERING)})")
        for name in ("temperature", "noise", "stopping", "heldout", "scales", "diagnose"):
            if getattr(self.tuning, name, None):
                raise ValueError(
                    f"rounds of queries do not read method.tuning.{name}; leave it out (method.noise is the answers')"
                )
        process = prior.process(shape) if self.tuning is None else prior.process(shape, self.tuning.eta)
        rounds = self.rounds(process, process.times(prior.steps), nothing, nothing)
        if isinstance(rounds, seiko.Seiko):
            rounds.inner(nothing, reference=[nothing, nothing], temperature=[self.temperature, self.temperature])
        else:
            rounds.steer(nothing)
        checks.at_least("seeds", self.seeds, 1)

    def rounds(self, process: Process, times: Any, model: Any, denoiser: Any) -> Any:
        """Build the method; one object serves all seeds, so that they share compiled programs."""
        wrap = {"upper": lambda s: s, "mean": surrogates.greedy, "thompson": surrogates.thompson}
        shared: dict[str, Any] = {
            "prior": denoiser,
            "batch": max(self.queries),
            "capacity": sum(self.queries),
            "feasibility": self.feasibility,
            "feasibility_weight": self.feasibility_weight,
            "noise": self.noise,
        }
        surrogate = wrap[checks.one_of("optimism", self.optimism, OPTIMISM)](self.surrogate)
        if self.tuning is None:
            steer = _steer(process, denoiser, self.temperature, str(self.steering), self.options)
            return seiko.steered(process, times, surrogate, steer, **shared)
        tuning = self.tuning

        def inner(reward: Any, **anchors: Any) -> Any:
            return tuning.build(model, process, reward, times, **anchors)

        anchors = {
            "temperature": self.temperature,
            "proximal_weight": self.proximal_weight,
            "schedule": self.schedule,
            "steps": tuning.steps,
        }
        return seiko.seiko(model, process, times, surrogate, inner, **shared, **anchors)

    def programs(self, name: str, prior: ReadyPrior, task: Task, count: int) -> Iterator[Any]:
        """Yield the programs of a round, of shapes (`rgdiff.recipes.programs`): a refit, a tuning step, and the chain of its model."""
        from rgdiff.recipes.programs import KEY, Program, chain, step
        from rgdiff.runtime import campaign
        from rgdiff.runtime.planning import Call

        process, model, params = prior.process, prior.model, prior.params
        if (tuning := self.tuning) is not None:
            process, model = prior.with_eta(tuning.eta), tuning.model(prior)
            params = jax.eval_shape(lambda: tuning.first(prior, jax.random.key(0)))
        method = self.rounds(process, prior.times, model, prior.denoiser)
        state = jax.eval_shape(lambda method, params: method.init(params), method, params)
        refit = Call(campaign._refit, (method, KEY, state))
        yield Program(f"{name}, refit", "a round's surrogate", sum(self.queries), lambda _: refit, 0)
        if tuning is not None:

            def tuner(batch: int) -> Any:
                sized = dataclasses.replace(self, tuning=dataclasses.replace(tuning, batch=batch))
                made = sized.rounds(process, prior.times, model, prior.denoiser)
                return jax.eval_shape(lambda made, state: made.tuner(state), made, state)

            yield step(name, tuner, params, tuning.batch, None, lambda _: None)
        sampler = jax.eval_shape(lambda method, state: method.sampler(state), method, state)
        yield chain(f"{name}, sampled", sampler, prior.times, max(self.queries), lambda _: None, prior.params)

    def run(self, run: Run, phase: str, prior: ReadyPrior, task: Task, count: int) -> Outcome:
        process, model, params = prior.process, prior.model, prior.params
        if self.tuning is not None:
            process, params = prior.with_eta(self.tuning.eta), self.tuning.start(run, phase, prior)
            model = self.tuning.model(prior)
        with run.clock() as clock:
            method = self.rounds(process, prior.times, model, prior.denoiser)
            names = [phase] if self.seeds == 1 else [f"{phase}_{seed}" for seed in range(self.seeds)]
            campaigns = [self.campaign(run, name, method, params, prior, task) for name in names]
            last = campaigns[0]
            x0, kl, lineages = judged(run, f"{phase}_samples", last, prior, count)
        rows = [[row for row in run.log.rows if row["phase"] == f"{name}_model"] for name in names]
        curves: dict[str, Any] = {}
        for name, title in SHOWN.items():
            series = np.array([[np.nan if row.get(name) is None else row[name] for row in one] for one in rows], float)
            some = ~np.isnan(series).all(0)
            if some.any():
                at, seen = np.array([row["queries"] for row in rows[0]])[some], series[:, some]
                curves[title] = {"": (at, np.nanmean(seen, 0), np.nanmin(seen, 0), np.nanmax(seen, 0))}
        calls = prior.calls(last.sampler)
        spent = self.seeds * sum(self.queries)
        trained = 0 if self.tuning is None else self.tuning.steps * self.tuning.batch * len(self.queries) * self.seeds
        asked = {f"queries of round {i + 1}": np.asarray(x0) for i, (x0, _) in enumerate(last.history())}
        return outcome(
            x0,
            calls,
            clock,
            kl,
            tuning_network_calls=(spent + trained) * method.network_calls(),
            curves=curves,
            figures={"reward_queries": float(sum(self.queries))},
            temperature=self.temperature,
            shown=asked,
            lineages=lineages,
            of=f"the first of {self.seeds} campaigns" if self.seeds > 1 else "",
        )

    def campaign(self, run: Run, name: str, method: Any, params: Any, prior: ReadyPrior, task: Task) -> Campaign:
        """Run one campaign to its end, judging the model of every round once."""
        steps = 1 if self.tuning is None else self.tuning.steps
        campaign = Campaign(run, name, method, params, self.queries, steps=steps)
        told = {row["step"] for row in run.log.rows if row["phase"] == f"{name}_model"}
        while True:
            campaign.finish()
            if campaign.round not in told:
                told.add(campaign.round)
                figures = self.figures(run, name, campaign, prior, task)
                run.log.write(f"{name}_model", campaign.round, figures)
                run.say(f"{name}: {figures['queries']} queries, " + ", ".join(
                    f"{key} {figures[key]:.4g}" for key in ("reward", "infeasible", "kl", "best") if figures.get(key) is not None
                ))  # fmt: skip
            if campaign.done:
                return campaign
            ids, x0 = campaign.ask()
            noise = [self.noise * jax.random.normal(jax.random.fold_in(run.key(f"{name}_noise"), int(i))) for i in ids]
            answers = _asked(name, task.reward, x0).astype(np.float64) + np.asarray(noise)
            campaign.tell(ids, np.where(np.isfinite(answers), answers, np.nan))

    def figures(self, run: Run, name: str, campaign: Campaign, prior: ReadyPrior, task: Task) -> dict[str, Any]:
        """Return the figures of the current model, and of the round that made it."""
        where = campaign.round
        x0, kl, _ = judged(run, f"{name}_{where}", campaign, prior, self.evaluate)
        rewards = _asked(name, task.reward, x0)
        feasible = np.isfinite(rewards)
        told = [row for row in run.log.rows if row["phase"] == name and row["step"] == where - 1]
        figures = {
            "queries": sum(self.queries[:where]),
            "reward": float(rewards[feasible].mean()) if feasible.any() else None,
            "infeasible": float(1 - feasible.mean()),
            "diversity": metrics.diversity(x0),
            "kl": kl,
        }
        best = [row["best"] for row in run.log.rows if row["phase"] == name and row["best"] is not None]
        figures["best"] = max(best) if best else None
        return figures | {key: row[key] for row in told for key in ("bonus", "covered")}


def judged(run: Run, phase: str, campaign: Campaign, prior: ReadyPrior, count: int) -> tuple[np.ndarray, float, Any]:
    """Draw samples of the current model; return them, the path KL of the same chains to the prior, NaN where it is steered, and lineages.

    Args:
      run: for the key and progress.
      phase: name of the draws.
      campaign: whose model is sampled.
      prior: ready.
      count: number of samples.
    """
    sampler = campaign.sampler
    if not isinstance(campaign.method, seiko.Seiko):
        out = draw(run, phase, sampler, prior, count)
        return np.asarray(out.x0), float("nan"), out.info.get("lineages")
    return *draw_with_kl(run, phase, sampler, prior, count), None


def _asked(name: str, reward: Any, x0: Any) -> np.ndarray:
    """Return the oracle's answers, asked for by one process. A black box that raises has not answered: its samples are not infeasible."""
    if not isinstance(reward, HostReward):
        return np.asarray(score(reward, jax.tree.map(jnp.asarray, x0)))
    try:
        return shared_array(lambda: reward.answers(x0))
    except Exception as error:
        raise ValueError(
            f"{name}: the reward raised {type(error).__name__}: {error}; none of these samples is answered, "
            "and resume=true asks for the same again"
        ) from error


def _steer(process: Process, denoiser: Any, temperature: float, name: str, options: dict[str, Any]) -> Any:
    """A function reward -> sampler of the prior's chain under that reward."""
    checks.one_of("steering", name, STEERING)

    def steer(reward: Any) -> Any:
        value = values.posterior_mean(reward, process, denoiser)
        if name == "svdd":
            return samplers.svdd(process, denoiser, value, temperature=temperature, **{"candidates": 16, **options})
        if name == "smc":
            chosen = dict(options)
            particles = chosen.pop("particles", 4)
            return samplers.resampled(
                samplers.smc(process, denoiser, value, temperature=temperature, **chosen), particles
            )
        if name == "best_of_n":
            return samplers.best_of_n(samplers.ancestral(process, denoiser), reward, options.get("candidates", 16))
        if isinstance(process, MaskedProcess):
            return samplers.ancestral(process, denoiser, guide=guides.gradient_guide(value, 1 / temperature))
        return samplers.ancestral(process, guides.classifier_guidance(denoiser, process, value, 1 / temperature))

    return steer
