"""A genetic algorithm for the weights of deep networks (Such et al. 2017, arXiv:1712.06567), also led by novelty.

A genome is a list of seeds, (τ_0; (τ_1, σ_1), …, (τ_n, σ_n)), and stands for the weights

    θ_0 = φ(τ_0),    θ_k = θ_{k-1} + σ_k ε(τ_k),    ε(τ) ~ N(0, I) from a generator seeded with τ

so that n mutations of a network take n + 1 seeds, however many weights it has. φ draws a weight from N(0, 1/fan_in),
one of the output layer with a tenth of that standard deviation, and sets biases to 0. In each generation (Algorithm 1)

 1. N genomes are made: at random the first time, later by one more mutation of a parent chosen uniformly from T.
 2. All are evaluated and sorted, the best first, ties by their place.
 3. The elite is the best of C candidates over further, longer evaluations: of the first C, later of the former elite
    and the first C - 1. It goes on unchanged.
 4. The T parents of the next generation are the elite and the first T - 1 others.

There is no crossover. Random search is step 1 without parents. Led by novelty, GA-NS, parents are the T genomes whose
behaviour, such as the place where a robot ends up, lies furthest from the k nearest behaviours in the population and in
an archive that each behaviour enters with a small chance; fitness only decides what is kept as the result.

Followed is the authors' GPU code. Their noise comes from a table of 250 million numbers, in which the mutations of
different seeds overlap; here every seed has its own stream, NumPy's Philox with the seed as key. The text speaks of
Xavier's initialisation; φ is that of the code. With C = 1, the code would never replace the first elite: at least one
newcomer is a candidate here. The number of neighbours, the chance of entering the archive, and that the elite is no
parent under novelty could not be looked up in the paper; 25 and 0.01 are what novelty search is often run with.

Seeds decode to the same weights with the same version of NumPy, which does not promise it of others.
"""

import math
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.spatial import KDTree
from torch import Tensor, nn

from fairtrial.methods.arguments import require

RUN = struct.Struct("<Id")  # so many mutations in succession, all of this σ
POPULATION, VALIDATION, TEST = range(3)  # what an episode is for: its seed depends on it

Init = Callable[[np.random.Generator], Any]


@dataclass(frozen=True)
class Genome:
    """A network as the seeds that it is made from.

    Args:
        init_seed: τ_0, within [0, 2³²).
        mutations: (τ_k, σ_k), the seed of each mutation and its power, above 0. Lists, as in JSON, become tuples.

    It is hashable, and `dataclasses.asdict` makes JSON of it that `Genome(**…)` takes back.
    """

    init_seed: int
    mutations: Sequence[Sequence[Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mutations", tuple((seed, float(sigma)) for seed, sigma in self.mutations))
        for seed in self.seeds:
            whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
            require(whole, "seeds", seed, "whole numbers within [0, 2**32)")
        for _, sigma in self.mutations:
            require(0 < sigma < math.inf, "sigma", sigma, "above 0 and finite")

    @property
    def seeds(self) -> tuple[int, ...]:
        """τ_0, …, τ_n."""
        return (self.init_seed, *(seed for seed, _ in self.mutations))

    @property
    def parent(self) -> "Genome | None":
        """Without the last mutation; None if there is none."""
        return Genome(self.init_seed, self.mutations[:-1]) if self.mutations else None

    def mutated(self, seed: int, sigma: float) -> "Genome":
        """With one mutation more."""
        return Genome(self.init_seed, (*self.mutations, (seed, sigma)))

    @property
    def nbytes(self) -> int:
        """Bytes that `to_bytes` takes: 4 for the count, 4 a seed, and 12 for each run of mutations with the same σ."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The count of mutations, the seeds, then for each run of mutations with the same σ its length and σ."""
        runs = [RUN.pack(len(list(same)), sigma) for sigma, same in groupby(self.mutations, key=lambda each: each[1])]
        return np.array([len(self.mutations), *self.seeds], dtype="<u4").tobytes() + b"".join(runs)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Genome":
        """The genome that `to_bytes` has written.

        Raises:
            ValueError: the bytes are none that it writes.
        """
        mutations = int.from_bytes(data[:4], "little")
        runs = 4 * (mutations + 2)
        whole = len(data) >= runs and (len(data) - runs) % RUN.size == 0
        require(whole, "data", f"{len(data)} bytes", "a genome as to_bytes writes it")
        init_seed, *seeds = np.frombuffer(data[4:runs], dtype="<u4").tolist()
        sigmas = [sigma for length, sigma in RUN.iter_unpack(data[runs:]) for _ in range(min(length, mutations + 1))]
        require(len(sigmas) == mutations, "data", f"{len(sigmas)} powers", f"a power for each of {mutations} mutations")
        return cls(init_seed, tuple(zip(seeds, sigmas, strict=True)))

    def __reduce__(self) -> Any:
        return Genome.from_bytes, (self.to_bytes(),)


def generator_of(seed: int) -> np.random.Generator:
    """The generator that a seed of a genome stands for."""
    return np.random.Generator(np.random.Philox(key=seed))


def fan_in_normal(shapes: Sequence[tuple[int, ...]], output_scale: float = 0.1) -> Init:
    """φ: from a generator a flat vector for parameters of these shapes, laid out as PyTorch's, the outputs first.

    Weights, of two dimensions or more, are normal with variance 1 / fan_in, those of the last one times output_scale².
    Whatever has fewer dimensions is 0.
    """
    last = max((place for place, shape in enumerate(shapes) if len(shape) > 1), default=None)
    scales = []
    for place, shape in enumerate(shapes):
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.0
        scales.append(np.full(math.prod(shape), scale * (output_scale if place == last else 1.0), dtype=np.float32))
    flat = np.concatenate(scales)
    return lambda generator: flat * generator.standard_normal(len(flat), dtype=np.float32)


class Generation(NamedTuple):
    """What happened in a generation: its number from 1, episodes spent so far, and fitness.

    `best` and `mean` are of the population; `elite_score` is the elite's mean over its validation episodes.
    """

    number: int
    evaluations: int
    best: float
    mean: float
    elite_score: float


class _GenomeSearch:
    """What searches over genomes share: decoding, evaluation, and which genome is kept as the elite."""

    def __init__(
        self,
        model_or_shapes: nn.Module | Iterable[Sequence[int]],
        fitness_fn: Callable[[Any, Any], Any],
        population_size: int = 1000,
        n_elite_candidates: int = 10,
        n_validation: int = 30,
        init: str | Init = "fan_in_normal",
        output_scale: float = 0.1,
        seed: int = 0,
        *,
        n_episodes: int = 1,
        vectorized: bool = False,
    ) -> None:
        require(population_size >= 1, "population_size", population_size, "at least 1")
        within = 1 <= n_elite_candidates <= population_size
        require(within, "n_elite_candidates", n_elite_candidates, "within 1..population_size")
        require(n_validation >= 1, "n_validation", n_validation, "at least 1")
        require(n_episodes >= 1, "n_episodes", n_episodes, "at least 1")
        require(0 < output_scale < math.inf, "output_scale", output_scale, "above 0 and finite")
        require(callable(init) or init == "fan_in_normal", "init", init, "'fan_in_normal' or a callable")
        if isinstance(model_or_shapes, nn.Module):
            model_or_shapes = [p.shape for p in model_or_shapes.parameters()]
        self.shapes = [tuple(shape) for shape in model_or_shapes]
        self.n_params = sum(math.prod(shape) for shape in self.shapes)
        require(self.n_params > 0, "model_or_shapes", self.shapes, "at least one parameter")
        self.fitness_fn, self.population_size, self.vectorized = fitness_fn, population_size, vectorized
        self.n_elite_candidates, self.n_validation, self.n_episodes = n_elite_candidates, n_validation, n_episodes
        self.init, self.output_scale, self.seed = init, output_scale, seed
        self._random = np.random.default_rng(seed)
        self._asked: list[Genome] = []
        self._decoded: dict[Genome, ndarray] = {}  # the parents
        self.elite_: Genome | None = None
        self.best_: Genome | None = None
        self.best_score_ = -math.inf
        self.evaluations_ = 0
        self.history_: list[Generation] = []

    def ask(self) -> list[Genome]:
        """The population to be evaluated; the same until it has been told of."""
        if not self._asked:
            self._asked = [self._offspring() for _ in range(self.population_size)]
        return list(self._asked)

    def tell(self, fitnesses: Any) -> None:
        """Take the fitness (N,) of the population, larger being better, choose the elite, and select the parents.

        The candidates for the elite are evaluated with `fitness_fn`. NaN counts as -∞, with a warning.

        Raises:
            ValueError: nothing was asked for, or there are not as many values as genomes; nothing has changed then.
        """
        fitnesses = self._checked(fitnesses)
        ranked = self._ranked(fitnesses)
        self._choose_elite(ranked, fitnesses)
        self._select(ranked)
        self._asked = []

    def step(self) -> None:
        """A generation: ask, evaluate, tell."""
        self.tell(self._evaluate(self.ask(), POPULATION, self.n_episodes))

    def run(self, budget_evaluations: int) -> Genome:
        """Take generations as long as all episodes, those for validation included, fit in the budget; gives `best_`.

        Raises:
            ValueError: the budget is not enough for one generation.
        """
        first = self.evaluations_ + self._cost()
        require(first <= budget_evaluations, "budget_evaluations", budget_evaluations, f"at least {first}")
        while self.evaluations_ + self._cost() <= budget_evaluations:
            self.step()
        return self.best_  # type: ignore[return-value]

    def evaluate(self, genome: Genome, n_episodes: int = 200) -> float:
        """The mean fitness over fresh episodes, which the search has never seen and which do not count."""
        require(n_episodes >= 1, "n_episodes", n_episodes, "at least 1")
        return float(self._evaluate([genome], TEST, n_episodes)[0])

    def decode(self, genome: Genome) -> Float[Tensor, " p"]:
        """The weights of a genome, float32 and flat, as `torch.nn.utils.vector_to_parameters` takes them.

        From a parent of the present generation or from its child only the last mutation is added.
        """
        return torch.from_numpy(self._weights(genome))

    def _weights(self, genome: Genome) -> Float[ndarray, " p"]:
        parent, mutations = genome.parent, genome.mutations
        if genome in self._decoded:
            known, mutations = self._decoded[genome], ()
        elif parent in self._decoded:
            known, mutations = self._decoded[parent], mutations[-1:]
        else:
            known = self._initial(genome.init_seed)
        theta = known.copy()
        for seed, sigma in mutations:
            theta += sigma * generator_of(seed).standard_normal(self.n_params, dtype=np.float32)
        return theta

    def _initial(self, seed: int) -> Float[ndarray, " p"]:
        init = self.init if callable(self.init) else fan_in_normal(self.shapes, self.output_scale)
        theta = np.asarray(init(generator_of(seed)), dtype=np.float32)
        require(theta.shape == (self.n_params,), "init", theta.shape, f"a function to vectors ({self.n_params},)")
        return theta

    def _offspring(self) -> Genome:
        return Genome(self._new_seed())

    def _new_seed(self) -> int:
        return int(self._random.integers(2**32))

    def _select(self, ranked: Sequence[Genome]) -> None:
        """Choose the parents, if there are to be any."""

    def _checked(self, fitnesses: Any) -> Float[ndarray, " n"]:
        require(len(self._asked) > 0, "tell", "no population", "preceded by ask")
        shape, asked = np.shape(fitnesses), len(self._asked)
        require(shape == (asked,), "fitnesses", shape, f"of shape ({asked},), one for each genome")
        return _without_nan(fitnesses)

    def _ranked(self, scores: Float[ndarray, " n"]) -> list[Genome]:
        """The population, the highest score first."""
        return [self._asked[place] for place in np.argsort(-scores, kind="stable")]

    def _choose_elite(self, ranked: Sequence[Genome], fitnesses: Float[ndarray, " n"]) -> None:
        former = [] if self.elite_ is None else [self.elite_]
        candidates = [*former, *ranked[: self._candidates() - len(former)]]
        scores = self._evaluate(candidates, VALIDATION, self.n_validation)
        best = int(scores.argmax())
        self.elite_ = candidates[best]
        if self.best_ is None or scores[best] > self.best_score_:
            self.best_, self.best_score_ = self.elite_, float(scores[best])
        self.evaluations_ += self.population_size * self.n_episodes + len(candidates) * self.n_validation
        highest, mean = float(fitnesses.max()), float(fitnesses.mean())
        self.history_.append(Generation(len(self.history_) + 1, self.evaluations_, highest, mean, float(scores[best])))

    def _candidates(self) -> int:
        """For the elite: C, but always at least one newcomer."""
        return max(self.n_elite_candidates, 1 if self.elite_ is None else 2)

    def _cost(self) -> int:
        """Episodes of the next generation."""
        return self.population_size * self.n_episodes + self._candidates() * self.n_validation

    def _evaluate(self, genomes: Sequence[Genome], purpose: int, n_episodes: int) -> Float[ndarray, " m"]:
        """The mean fitness of each genome over episodes of its own."""
        return _without_nan(self._episodes(self.fitness_fn, genomes, self._seeds(len(genomes), purpose, n_episodes)))

    def _seeds(self, genomes: int, purpose: int, n_episodes: int) -> ndarray:
        generation = 0 if purpose == TEST else len(self.history_)
        sequence = np.random.SeedSequence([self.seed, purpose, generation])
        return sequence.generate_state(genomes * n_episodes).reshape(genomes, n_episodes)

    def _episodes(self, function: Callable[[Any, Any], Any], genomes: Sequence[Genome], seeds: ndarray) -> ndarray:
        """What the function gives, averaged over episodes (m, e), for each genome."""
        if self.vectorized:
            found = np.asarray(function(torch.stack([self.decode(genome) for genome in genomes]), seeds), dtype=float)
            fits = found.shape[:2] == seeds.shape
            require(fits, "the function", found.shape, f"one that gives values for genomes and episodes {seeds.shape}")
        else:
            found = np.array(
                [
                    [np.asarray(function(self.decode(genome), int(seed)), dtype=float) for seed in row]
                    for genome, row in zip(genomes, seeds, strict=True)
                ]
            )
        means: ndarray = found.mean(1)
        return means


def _without_nan(scores: Any) -> Float[ndarray, " m"]:
    found = np.asarray(scores, dtype=float)
    if np.isnan(found).any():
        warnings.warn(f"{np.isnan(found).sum()} fitness values are NaN and count as -inf", stacklevel=4)
    return np.where(np.isnan(found), -np.inf, found)


class RandomSearch(_GenomeSearch):
    """As many random genomes in every generation, and the elite as in `DeepGA`: what mutation has to beat.

    Arguments, attributes and errors are those of `DeepGA`, without parents.
    """


class DeepGA(_GenomeSearch):
    """Truncation selection, mutation and an elite, over genomes of seeds: larger fitness is better.

    Args:
        model_or_shapes: a model, or the shapes of its parameters in order.
        fitness_fn: `fitness_fn(params, episode_seed)` gives the fitness of weights (p,), a float32 tensor on the CPU,
            in the episode of that seed, a whole number; for the population as well as for validation.
        population_size: N, at least 1.
        truncation: T, how many are parents, within 1..N.
        sigma: power σ of mutations, above 0; on the scale of the weights, so that small networks need far more than
            the default. It may be changed between generations.
        n_elite_candidates: C, within 1..N.
        n_validation: episodes that a candidate is evaluated in.
        init: 'fan_in_normal', for which parameters of one dimension are biases and 0, or a function from a NumPy
            generator to weights (p,).
        output_scale: of 'fan_in_normal' for the output layer, above 0.
        seed: decides everything, whatever the order of evaluation.
        n_episodes: that an individual is evaluated in, 1 for Atari and 5 for the humanoid.
        vectorized: `fitness_fn` is called once with weights (m, p) and episode seeds (m, e) of m genomes, and gives
            an array (m, e). All m are in memory together.

    Attributes:
        elite_: the elite, None before the first generation.
        best_: the elite with the highest score in validation so far, `best_score_`; what is to be kept as the result.
        evaluations_: episodes so far, those for validation included.
        history_: a `Generation` for each.

    The defaults are the authors' for Atari. A search can be pickled and goes on as if it had not been, if `fitness_fn`
    and `init` can.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        model_or_shapes: nn.Module | Iterable[Sequence[int]],
        fitness_fn: Callable[[Any, Any], Any],
        population_size: int = 1000,
        truncation: int = 20,
        sigma: float = 0.002,
        n_elite_candidates: int = 10,
        n_validation: int = 30,
        init: str | Init = "fan_in_normal",
        output_scale: float = 0.1,
        seed: int = 0,
        *,
        n_episodes: int = 1,
        vectorized: bool = False,
    ) -> None:
        super().__init__(
            model_or_shapes,
            fitness_fn,
            population_size,
            n_elite_candidates,
            n_validation,
            init,
            output_scale,
            seed,
            n_episodes=n_episodes,
            vectorized=vectorized,
        )
        require(1 <= truncation <= population_size, "truncation", truncation, "within 1..population_size")
        require(0 < sigma < math.inf, "sigma", sigma, "above 0 and finite")
        self.truncation, self.sigma = truncation, sigma

    def _offspring(self) -> Genome:
        parents = list(self._decoded)
        if not parents:
            return super()._offspring()
        return parents[self._random.integers(len(parents))].mutated(self._new_seed(), self.sigma)

    def _select(self, ranked: Sequence[Genome]) -> None:
        others = [genome for genome in ranked if genome is not self.elite_]
        self._breed_from([self.elite_, *others][: self.truncation])

    def _breed_from(self, parents: Sequence[Any]) -> None:
        self._decoded = {genome: self._weights(genome) for genome in parents}


class NoveltyGA(DeepGA):
    """The genetic algorithm with parents chosen by novelty of behaviour instead of fitness, for deceptive tasks.

    Args:
        behavior_fn: `behavior_fn(params, episode_seed)` gives the fitness and the behaviour (b,) in an episode;
            vectorised, for m genomes and e episodes, fitness (m, e) and behaviours (m, e, b).
        k: neighbours that novelty is the mean distance to, at least 1.
        archive_prob: chance of each behaviour to be archived, within [0, 1].

    All else is as of `DeepGA`; the elite is the fittest, and no parent.

    Attributes:
        archive_ (a, b): the archived behaviours.
        behaviors_ (N, b): of the last population, each the mean over its episodes.
    """

    def __init__(
        self,
        model_or_shapes: nn.Module | Iterable[Sequence[int]],
        behavior_fn: Callable[[Any, Any], tuple[Any, Any]],
        population_size: int = 1000,
        truncation: int = 20,
        sigma: float = 0.002,
        k: int = 25,
        archive_prob: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(model_or_shapes, self._fitness, population_size, truncation, sigma, **options)
        require(population_size >= 2, "population_size", population_size, "at least 2")
        require(k >= 1, "k", k, "at least 1")
        require(0 <= archive_prob <= 1, "archive_prob", archive_prob, "within [0, 1]")
        self.behavior_fn, self.k, self.archive_prob = behavior_fn, k, archive_prob
        self.archive_: ndarray | None = None
        self.behaviors_: ndarray | None = None

    def tell(self, fitnesses: Any, behaviors: Any = None) -> None:
        """Take fitness (N,) and behaviours (N, b) of the population, choose the elite, and select the most novel.

        Raises:
            ValueError: nothing was asked for, shapes do not fit, or behaviours are not finite; nothing has changed
                then.
        """
        fitnesses, behaviors = self._checked(fitnesses), np.asarray(behaviors, dtype=float)
        known = None if self.archive_ is None else self.archive_.shape[1]
        fits = behaviors.ndim == 2 and len(behaviors) == len(fitnesses) and known in (None, behaviors.shape[1])
        require(fits, "behaviors", behaviors.shape, f"of shape ({len(fitnesses)}, {known or 'b'})")
        require(bool(np.isfinite(behaviors).all()), "behaviors", "NaN or infinity", "finite")
        archive = behaviors[:0] if self.archive_ is None else self.archive_
        self._choose_elite(self._ranked(fitnesses), fitnesses)
        self._breed_from(self._ranked(novelty(behaviors, archive, self.k))[: self.truncation])
        entering = self._random.random(len(behaviors)) < self.archive_prob
        self.archive_, self.behaviors_ = np.vstack([archive, behaviors[entering]]), behaviors
        self._asked = []

    def step(self) -> None:
        """A generation: ask, evaluate, tell."""
        genomes, seeds = self.ask(), self._seeds(self.population_size, POPULATION, self.n_episodes)
        both = self._episodes(self._joined, genomes, seeds)
        self.tell(both[:, 0], both[:, 1:])

    def _fitness(self, params: Any, episode_seeds: Any) -> Any:
        return self.behavior_fn(params, episode_seeds)[0]

    def _joined(self, params: Any, episode_seeds: Any) -> ndarray:
        """Fitness and behaviour in one array."""
        fitness, behavior = self.behavior_fn(params, episode_seeds)
        return np.concatenate([np.asarray(fitness, dtype=float)[..., None], np.asarray(behavior, dtype=float)], axis=-1)


def novelty(behaviors: Float[ndarray, "n b"], archive: Float[ndarray, "a b"], k: int = 25) -> Float[ndarray, " n"]:
    """The mean distance of each behaviour to the k nearest others among these and the archived ones.

    If there are fewer others than k, it is the mean distance to all of them.
    """
    known = np.vstack([behaviors, archive])
    k = min(k, len(known) - 1)
    distances: Any = KDTree(known).query(behaviors, k=k + 1)[0]
    means: ndarray = distances[:, 1:].mean(1)  # the nearest is the behaviour itself
    return means
