"""The claims on deep neuroevolution: mutations beat random search, novelty gets out of a trap, genomes are small.

Instead of Atari and the humanoid, a pendulum is swung up by a network of 1217 weights, with as many episodes for every
method, those for validation included; the result of a run is the candidate with the best validation, on 100 fresh
episodes. In the maze, searches run until a member of the population reaches the goal. Every arm has the best of three
settings by tuning seeds: the power of mutations, for random search the scale of the output layer, for the evolution
strategy the learning rate.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import rankdata
from torch import Tensor

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.methods.optimizers.deep_ga import DeepGA, Genome, NoveltyGA, RandomSearch, fan_in_normal, generator_of
from fairtrial.methods.optimizers.policy_rollouts import DeceptiveMaze, PendulumReturn

GENETIC, RANDOM, STRATEGY = "genetic algorithm", "random search", "evolution strategy"
PENDULUM, MAZE = PendulumReturn(), DeceptiveMaze()
POPULATION, PARENTS, EPISODES, GENERATIONS = 64, 8, 5, 15
CANDIDATES, VALIDATIONS, TESTS = 3, 10, 100
GRIDS = {GENETIC: (0.05, 0.1, 0.3), RANDOM: (0.1, 0.3, 1.0), STRATEGY: (0.01, 0.03, 0.1)}
NOISE = 0.1  # of the evolution strategy
NOVELTY, REWARD = "novelty", "reward"
POWERS = (0.05, 0.1, 0.3)
MAZE_POPULATION, MAZE_PARENTS, MAZE_GENERATIONS = 100, 10, 150
TUNING_SEEDS, SEEDS = 2, 10
WEIGHTS, MUTATIONS = (1_000, 10_000, 100_000, 1_000_000, 4_000_000), (0, 1, 10, 100, 400)


def check(measure: Measure) -> list[Finding]:
    return [_pendulum(measure), _maze(measure), _genomes(measure)]


@dataclass(frozen=True)
class Setting:
    """A method with the one number that was tuned."""

    method: str
    value: float


def _tuned(measure: Measure, function: Any, grids: Mapping[str, tuple[float, ...]]) -> tuple[dict[str, Any], str]:
    settings = {arm: [Setting(arm, value) for value in values] for arm, values in grids.items()}
    chosen = tune(measure, function, settings, seeds=TUNING_SEEDS, score=float)
    note = "Chosen: " + ", ".join(f"{arm} {setting.value:g}" for arm, setting in chosen.items()) + "."
    return evaluate(measure, function, chosen, seeds=SEEDS), note


def _pendulum(measure: Measure) -> Finding:
    returns, chosen = _tuned(measure, pendulum, GRIDS)
    ahead = {other: gaps(returns[GENETIC], returns[other]) for other in (RANDOM, STRATEGY)}
    beats_random = above_zero(ahead[RANDOM])[0]
    as_good = fmean(ahead[STRATEGY]) >= -stdev(ahead[STRATEGY]) / sqrt(len(ahead[STRATEGY]))
    says: Verdict = "not reproduced"
    if beats_random:
        says = "reproduced" if as_good else "partly"
    paper = {GENETIC: "4536", RANDOM: "1164", STRATEGY: "370"}
    steps = GENERATIONS * (POPULATION * EPISODES + CANDIDATES * VALIDATIONS) * PENDULUM.steps
    return Finding(
        claim="beats-random-search",
        verdict=says,
        criterion="The mean return over fresh episodes is significantly above that of random search (paired sign-flip "
        "test over ten seeds), and its mean is not below that of the evolution strategy by more than one standard "
        "error of the paired difference; partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"return on the pendulum, {arm}", found, "return", paper=f"{paper[arm]} on Frostbite")
                for arm, found in returns.items()
            ),
            *(
                measured(f"return of the genetic algorithm above, {arm}", found, "return")
                for arm, found in ahead.items()
            ),
            single("environment steps of each run", steps, "steps"),
        ),
        note=f"{chosen} The evolution strategy is OpenAI's: antithetic pairs with noise of {NOISE:g}, centred ranks, "
        "and Adam.",
    )


def _maze(measure: Measure) -> Finding:
    generations, chosen = _tuned(measure, maze, {NOVELTY: POWERS, REWARD: POWERS})
    reached = {arm: sum(-found <= MAZE_GENERATIONS for found in values) for arm, values in generations.items()}
    says: Verdict = "not reproduced"
    if reached[NOVELTY] > reached[REWARD]:
        clear = reached[NOVELTY] >= 0.8 * SEEDS and reached[REWARD] <= 0.2 * SEEDS
        says = "reproduced" if clear else "partly"
    return Finding(
        claim="novelty-deceptive",
        verdict=says,
        criterion="Within equally many evaluations a member of the population reaches the goal in at least 8 of 10 "
        "seeds with novelty, and in at most 2 with reward; partly if novelty reaches it more often.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                single(f"seeds in which the goal is reached, {arm}", count, "seeds", paper=paper)
                for (arm, count), paper in zip(reached.items(), ("solved", "not solved"), strict=True)
            ),
            *(
                measured(f"generations until then, {arm}", [-found for found in values], "generations")
                for arm, values in generations.items()
            ),
        ),
        note=f"{chosen} Searches that do not reach it in {MAZE_GENERATIONS} generations of {MAZE_POPULATION} count "
        "with one more. The maze was built so that the way to the goal leads away from it first.",
    )


def _genomes(measure: Measure) -> Finding:
    measure.say("counting bytes of genomes")
    sizes = {(weights, mutations): genome_bytes(weights, mutations) for weights in WEIGHTS for mutations in MUTATIONS}
    depends_only = all(len({sizes[weights, mutations][0] for weights in WEIGHTS}) == 1 for mutations in MUTATIONS)
    largest, longest = WEIGHTS[-1], MUTATIONS[-1]
    ratios = {mutations: sizes[largest, mutations][2] / sizes[largest, mutations][0] for mutations in MUTATIONS}
    says: Verdict = "not reproduced"
    if depends_only:
        says = "reproduced" if ratios[longest] > 5000 else "partly"
    return Finding(
        claim="compact-genome",
        verdict=says,
        criterion="The bytes of a genome are the same for all networks, and at 4,000,000 weights and 400 mutations "
        "those of the float32 weights are more than 5000 times as many; partly if only the first holds.",
        seeds=(0,),
        measurements=(
            *(
                single(f"bytes of a genome, {mutations} mutations", sizes[largest, mutations][0], "bytes")
                for mutations in MUTATIONS
            ),
            *(
                single(f"bytes of its pickle, {mutations} mutations", sizes[largest, mutations][1], "bytes")
                for mutations in MUTATIONS
            ),
            *(single(f"bytes of {weights} weights", sizes[weights, 0][2], "bytes") for weights in WEIGHTS),
            *(
                single(
                    f"weights over genome, {largest} weights, {mutations} mutations",
                    ratio,
                    "ratio",
                    paper="up to 10,000" if mutations == longest else "",
                )
                for mutations, ratio in ratios.items()
            ),
        ),
        note="A seed takes 4 bytes, the count of mutations 4, and a power that all of them share 12.",
    )


def pendulum(run: Run[Setting]) -> float:
    """Search, and give the mean return of the result over fresh episodes."""
    method, value = run.setting.method, run.setting.value
    common = {
        "population_size": POPULATION,
        "n_elite_candidates": CANDIDATES,
        "n_validation": VALIDATIONS,
        "n_episodes": EPISODES,
        "seed": run.seed,
        "vectorized": True,
    }
    budget = GENERATIONS * (POPULATION * EPISODES + CANDIDATES * VALIDATIONS)
    shapes = PENDULUM.policy.shapes
    if method == STRATEGY:
        theta = evolution_strategy(value, run.seed)
    elif method == RANDOM:
        random = RandomSearch(shapes, PENDULUM, output_scale=value, **common)  # type: ignore[arg-type]
        theta = random.decode(random.run(budget))
    else:
        search = DeepGA(shapes, PENDULUM, truncation=PARENTS, sigma=value, **common)  # type: ignore[arg-type]
        theta = search.decode(search.run(budget))
    seeds = _episodes(run.seed, f"{run.split} of the result", 1, TESTS)
    return float(PENDULUM(theta[None], seeds).mean())


def _episodes(seed: int, purpose: str, policies: int, episodes: int) -> ndarray:
    """Seeds of episodes (policies, episodes)."""
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(policies * episodes)
    return state.reshape(policies, episodes)


def evolution_strategy(lr: float, seed: int) -> Tensor:
    """OpenAI's evolution strategy with the genetic algorithm's episodes; its θ with the best validation."""
    generator = generator_of(seed)
    theta = torch.from_numpy(fan_in_normal(PENDULUM.policy.shapes)(generator))
    adam = torch.optim.Adam([theta], lr=lr, maximize=True)
    best, best_score = theta.clone(), -np.inf
    for generation in range(GENERATIONS):
        noise = torch.from_numpy(generator.standard_normal((POPULATION // 2, len(theta)), dtype=np.float32))
        population = torch.cat([theta + NOISE * noise, theta - NOISE * noise])
        seeds = _episodes(seed, f"generation {generation}", POPULATION, EPISODES)
        ranks = rankdata(PENDULUM(population, seeds).mean(1)) / POPULATION - 0.5
        above, below = torch.from_numpy(ranks.astype(np.float32)).view(2, -1)
        theta.grad = (above - below) @ noise / (POPULATION * NOISE)
        adam.step()
        validation = _episodes(seed, f"validation {generation}", 1, CANDIDATES * VALIDATIONS)
        score = PENDULUM(theta[None], validation).mean()
        if score > best_score:
            best, best_score = theta.clone(), score
    return best


def maze(run: Run[Setting]) -> float:
    """Minus the generation in which the goal is reached, or minus one more than there are."""
    kind, given = (NoveltyGA, MAZE) if run.setting.method == NOVELTY else (DeepGA, maze_fitness)
    search: Any = partial(kind, vectorized=True, n_elite_candidates=1, n_validation=1, seed=run.seed)(
        MAZE.policy.shapes, given, MAZE_POPULATION, MAZE_PARENTS, run.setting.value
    )
    for generation in range(1, MAZE_GENERATIONS + 1):
        search.step()
        if search.history_[-1].best >= -MAZE.REACHED:
            return -generation
    return -(MAZE_GENERATIONS + 1)


def maze_fitness(params: Any, episode_seeds: Any) -> Any:
    return MAZE(params, episode_seeds)[0]


def genome_bytes(weights: int, mutations: int) -> tuple[int, int, int]:
    """Of a genome, of its pickle, and of the float32 weights that it is decoded to."""
    seeds = np.random.default_rng(mutations).integers(2**32, size=mutations + 1).tolist()
    genome = Genome(seeds[0], tuple((seed, 0.002) for seed in seeds[1:]))
    search = DeepGA([(1, weights)], maze_fitness, 1, 1, n_elite_candidates=1)
    return genome.nbytes, len(pickle.dumps(genome)), search.decode(Genome(genome.init_seed)).nbytes
