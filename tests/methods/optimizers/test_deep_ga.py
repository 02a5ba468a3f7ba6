import dataclasses
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fairtrial.methods.optimizers import DeepGA, Genome, NoveltyGA, RandomSearch, fan_in_normal, novelty
from fairtrial.methods.optimizers.deep_ga import RUN, generator_of


def standard_normal(generator):
    return generator.standard_normal(100)


def sphere(params, episode_seed):
    return -(params - 1).square().sum().item()


def noisy_sphere(params, episode_seed):
    return sphere(params, episode_seed) + np.random.default_rng(episode_seed).normal()


def place(params, episode_seed):
    """Fitness and behaviour: two of the weights."""
    return sphere(params, episode_seed), params[:2].numpy()


def small(kind=DeepGA, fitness=sphere, **options):
    given = {"population_size": 20, "n_elite_candidates": 2, "n_validation": 1, "init": standard_normal}
    if kind is not RandomSearch:
        given |= {"truncation": 5, "sigma": 0.05}
    return kind([(100,)], fitness, **{**given, **options})


def long_genome(mutations, sigma=0.002):
    seeds = np.random.default_rng(0).integers(2**32, size=mutations + 1).tolist()
    return Genome(seeds[0], tuple((seed, sigma) for seed in seeds[1:]))


def test_adding_a_mutation_to_a_parent_is_decoding_from_the_start_bit_for_bit():
    search = small()
    for _ in range(4):
        search.step()
    children = search.ask()
    assert all(len(child.mutations) >= 1 for child in children)
    afresh = small()
    for child in children:
        assert torch.equal(search.decode(child), afresh.decode(child))
    assert torch.equal(search.decode(search.elite_), afresh.decode(search.elite_))


def test_weights_handed_out_are_the_callers_own():
    search = small()
    search.step()
    search.decode(search.elite_).zero_()
    assert search.decode(search.elite_).abs().sum() > 0


def test_a_genome_takes_a_seed_for_every_mutation_and_nothing_for_weights():
    genome = long_genome(400)
    assert len(genome.seeds) == 401
    assert genome.nbytes == 4 + 4 * 401 + RUN.size
    weights = 4 * 4_000_000
    assert weights / (4 * len(genome.seeds)) == pytest.approx(9975, abs=0.5)
    assert weights / genome.nbytes > 9800
    assert len(pickle.dumps(genome)) < genome.nbytes + 120


@settings(deadline=None)
@given(
    init_seed=st.integers(0, 2**32 - 1),
    mutations=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0.002, 0.005, 1e-9])), max_size=20),
)
def test_a_genome_survives_bytes_pickle_and_json(init_seed, mutations):
    genome = Genome(init_seed, tuple(mutations))
    assert Genome.from_bytes(genome.to_bytes()) == genome
    assert pickle.loads(pickle.dumps(genome)) == genome
    assert Genome(**json.loads(json.dumps(dataclasses.asdict(genome)))) == genome
    assert (genome.parent is None) == (not mutations)


def test_damaged_bytes_are_refused():
    data = long_genome(3).to_bytes()
    more = data[:-12] + RUN.pack(2**31, 0.1)
    for damaged in (b"", data[:-1], data[:-12], data + data[-12:], b"\xff" * 40, more):
        with pytest.raises(ValueError, match="^data must be"):
            Genome.from_bytes(damaged)


def test_seeds_decode_alike_in_another_process():
    search = DeepGA([(4, 3), (4,)], sphere, 2, 1, n_elite_candidates=1)
    genome = long_genome(5)
    code = (
        "from fairtrial.methods.optimizers import DeepGA, Genome\n"
        f"genome = Genome.from_bytes({genome.to_bytes()!r})\n"
        "print(DeepGA([(4, 3), (4,)], None, 2, 1, n_elite_candidates=1).decode(genome).numpy().tobytes().hex())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == search.decode(genome).numpy().tobytes().hex()


def test_mutations_are_independent_unit_normals():
    search = DeepGA([(1000,)], sphere, 2, 1, n_elite_candidates=1)
    genome = long_genome(50, sigma=0.1)
    moved = search.decode(genome) - search.decode(Genome(genome.init_seed))
    assert moved.square().sum().item() / (50 * 0.1**2 * 1000) == pytest.approx(1, abs=3 * math.sqrt(2 / 1000))
    draws = np.array([generator_of(seed).standard_normal(1000) for seed in genome.seeds])
    assert stats.kstest(draws.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(draws) - np.eye(51)).max() < 0.17


def test_the_first_generation_is_scaled_by_the_fan_in():
    model = nn.Sequential(nn.Conv2d(4, 32, 8), nn.Flatten(), nn.Linear(512, 300), nn.Linear(300, 6))
    search = DeepGA(model, sphere, 2, 1, n_elite_candidates=1)
    nn.utils.vector_to_parameters(search.decode(Genome(1)), model.parameters())
    for layer, expected in ((model[0], 256**-0.5), (model[2], 512**-0.5), (model[3], 0.1 * 300**-0.5)):
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.06)
        assert (layer.bias == 0).all()
    whole = fan_in_normal(search.shapes, output_scale=1.0)(generator_of(1))
    assert whole[-1806:-6].std() == pytest.approx(300**-0.5, rel=0.06)


def test_the_sphere():
    search = small(population_size=100, truncation=10, n_elite_candidates=1)
    for _ in range(50):
        search.step()
    assert search.history_[0].elite_score < -120
    assert search.best_score_ > -80
    assert search.best_score_ == pytest.approx(-63, abs=4)  # 62.7 to 63.4 in three runs
    random = small(RandomSearch, population_size=100, n_elite_candidates=1)
    for _ in range(50):
        random.step()
    assert -140 < random.best_score_ < -110
    assert search.evaluations_ == random.evaluations_ == 5099


def test_with_deterministic_fitness_the_elite_never_gets_worse():
    search = small()
    scores = []
    for _ in range(15):
        former = search.elite_
        search.step()
        scores.append(search.history_[-1].elite_score)
        assert search.elite_ in search._decoded
        assert search.elite_ is former or scores[-1] > scores[-2:][0] or len(scores) == 1
    assert (np.diff(scores) >= 0).all()
    assert search.best_ is search.elite_


def test_the_former_elite_is_kept_however_bad_a_generation_is():
    search = small(n_elite_candidates=3)
    search.step()
    elite = search.elite_
    search.sigma = 100.0
    search.step()
    assert search.elite_ is elite
    parents = list(search._decoded)
    assert len(parents) == 5
    assert parents[0] == elite
    assert all(genome.mutations[-1][1] == 100.0 for genome in parents[1:])


def test_parents_are_the_elite_and_the_first_others():
    search = small(n_elite_candidates=3)
    population = search.ask()
    fitnesses = -np.arange(20.0)  # not those of the sphere, so that the elite need not be the first
    search.tell(fitnesses)
    assert search.elite_ in population[:3]
    assert set(search._decoded) == {search.elite_, *population[:5]}
    search = small(n_elite_candidates=20, truncation=2)
    population = search.ask()
    search.tell(fitnesses)
    best = max(population, key=lambda genome: sphere(search.decode(genome), 0))
    assert search.elite_ == best
    assert list(search._decoded) == [best, next(genome for genome in population if genome != best)]


def test_with_one_parent_all_descend_from_the_elite():
    search = small(truncation=1)
    for _ in range(3):
        search.step()
        assert {child.parent for child in search.ask()} == {search.elite_}


def test_parents_are_chosen_uniformly():
    search = small()
    search.step()
    parents = {parent.init_seed for parent in search._decoded}  # all without mutations
    search.population_size = 100_000
    drawn, counts = np.unique([child.init_seed for child in search.ask()], return_counts=True)
    assert set(drawn) == parents
    assert len(parents) == 5
    assert stats.chisquare(counts).pvalue > 0.01


def monotone(params, episode_seed):
    return math.atan(sphere(params, episode_seed) / 100)


def test_only_ranks_count():
    one, other = small(), small(fitness=monotone)
    for _ in range(6):
        one.step()
        other.step()
    assert one.elite_ == other.elite_
    assert one.ask() == other.ask()


def vectorized_noise(params, episode_seeds):
    one = [[noisy_sphere(theta, int(seed)) for seed in row] for theta, row in zip(params, episode_seeds, strict=True)]
    return np.array(one)


def test_a_seed_decides_everything_whatever_the_order_and_the_way_of_evaluation():
    options = {"n_episodes": 3, "n_validation": 4, "fitness": noisy_sphere}
    one, other = small(**options), small(**options | {"fitness": vectorized_noise}, vectorized=True)
    for _ in range(4):
        one.step()
        other.step()
    assert one.elite_ == other.elite_
    assert one.history_ == other.history_
    assert one.evaluate(one.elite_) == other.evaluate(one.elite_)
    asked = small()
    for _ in range(2):
        population = asked.ask()
        assert asked.ask() == population
        found = {genome: sphere(asked.decode(genome), 0) for genome in reversed(population)}
        asked.tell([found[genome] for genome in population])
    stepped = small()
    stepped.step()
    stepped.step()
    assert asked.elite_ == stepped.elite_
    assert asked.ask() == stepped.ask()
    assert small(seed=1).ask() != small().ask()


@pytest.mark.parametrize("kind", [DeepGA, RandomSearch, NoveltyGA])
def test_a_pickled_search_goes_on(kind):
    search = small(kind, place if kind is NoveltyGA else noisy_sphere)
    search.step()
    search.ask()
    copied = pickle.loads(pickle.dumps(search))
    for _ in range(2):
        search.step()
        copied.step()
    assert search.history_ == copied.history_
    assert search.ask() == copied.ask()


def test_the_budget_counts_validation():
    search = small(n_elite_candidates=3, n_validation=5, n_episodes=2)
    best = search.run(200)
    assert search.evaluations_ == 165 == 3 * (20 * 2 + 3 * 5)
    assert best is search.best_
    assert [each.evaluations for each in search.history_] == [55, 110, 165]
    with pytest.raises(ValueError, match="budget_evaluations must be at least 220"):
        search.run(200)


def test_the_best_so_far_is_by_validation_and_tests_are_fresh_episodes():
    seen = []

    def remembering(params, episode_seed):
        seen.append(episode_seed)
        return noisy_sphere(params, episode_seed)

    search = small(fitness=remembering, n_validation=3)
    for _ in range(8):
        search.step()
    assert search.best_score_ == max(each.elite_score for each in search.history_)
    assert len(set(seen)) == len(seen) == search.evaluations_
    before = len(seen)
    search.evaluate(search.best_, n_episodes=50)
    assert not set(seen[:before]) & set(seen[before:])
    assert search.evaluations_ == before


def test_random_search_never_mutates():
    search = small(RandomSearch)
    for _ in range(3):
        assert all(not genome.mutations for genome in search.ask())
        search.step()
    assert search.history_[-1].elite_score >= search.history_[0].elite_score


def test_nan_counts_as_the_worst():
    search = small()
    population = search.ask()
    with pytest.warns(UserWarning, match="1 fitness values are NaN"):
        search.tell([math.nan, *range(19)])
    assert population[0] not in search._decoded
    search = small(fitness=lambda params, seed: math.nan)
    with pytest.warns(UserWarning, match="NaN"):
        search.step()
    assert search.elite_ is not None
    assert search.best_score_ == -math.inf


def test_novelty_is_the_mean_distance_to_the_nearest():
    behaviors = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    archive = np.array([[0.0, 4.0]])
    np.testing.assert_allclose(novelty(behaviors, archive, k=1), [1, 1, 0, 0])
    np.testing.assert_allclose(novelty(behaviors, archive, k=2), [2, 1.5, 1, 1])
    np.testing.assert_allclose(novelty(behaviors[:2], archive[:0], k=25), [1, 1])
    random = np.random.default_rng(0).normal(size=(30, 2))
    distances = np.sort(np.linalg.norm(random[:, None] - random, axis=-1), axis=1)[:, 1:6].mean(1)
    np.testing.assert_allclose(novelty(random, random[:0], k=5), distances)


def test_parents_of_the_novelty_search_are_the_most_novel_and_behaviours_are_archived():
    search = small(NoveltyGA, place, k=3, archive_prob=1.0)
    population = search.ask()
    fitnesses = [sphere(search.decode(genome), 0) for genome in population]
    behaviors = np.array([search.decode(genome)[:2].numpy() for genome in population])
    search.tell(fitnesses, behaviors)
    order = np.argsort(-novelty(behaviors, behaviors[:0], 3), kind="stable")
    assert list(search._decoded) == [population[i] for i in order[:5]]
    assert search.elite_ == population[int(np.argmax(fitnesses))]
    np.testing.assert_array_equal(search.archive_, behaviors)
    search.step()
    assert search.archive_.shape == (40, 2)
    never = small(NoveltyGA, place, archive_prob=0.0)
    never.step()
    never.step()
    assert never.archive_.shape == (0, 2)
    spread = [np.linalg.norm(each.behaviors_.std(0)) for each in (never, search)]
    assert min(spread) > 0


def test_the_share_of_archived_behaviours():
    search = small(NoveltyGA, place, population_size=2000, archive_prob=0.1)
    search.step()
    assert len(search.archive_) == pytest.approx(200, abs=3 * math.sqrt(180))


def test_behaviours_that_do_not_fit_are_refused_and_change_nothing():
    search = small(NoveltyGA, place)
    population = search.ask()
    scores = [0.0] * 20
    for behaviors in (None, np.zeros(20), np.zeros((19, 2)), np.full((20, 2), math.nan)):
        with pytest.raises(ValueError, match="^behaviors must be"):
            search.tell(scores, behaviors)
    with pytest.raises(ValueError, match="^fitnesses must be"):
        search.tell(scores[1:], np.zeros((20, 2)))
    search.tell(scores, np.zeros((20, 2)))
    assert search.elite_ in population[:2]
    search.ask()
    with pytest.raises(ValueError, match="^behaviors must be"):
        search.tell(scores, np.zeros((20, 3)))
    assert len(search.history_) == 1


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [
        (DeepGA, {"truncation": 21}, "truncation"),
        (DeepGA, {"truncation": 0}, "truncation"),
        (DeepGA, {"sigma": 0.0}, "sigma"),
        (DeepGA, {"sigma": math.nan}, "sigma"),
        (DeepGA, {"population_size": 0}, "population_size"),
        (DeepGA, {"n_elite_candidates": 0}, "n_elite_candidates"),
        (DeepGA, {"n_elite_candidates": 21}, "n_elite_candidates"),
        (DeepGA, {"n_validation": 0}, "n_validation"),
        (DeepGA, {"n_episodes": 0}, "n_episodes"),
        (DeepGA, {"output_scale": 0.0}, "output_scale"),
        (DeepGA, {"init": "xavier"}, "init"),
        (RandomSearch, {"n_validation": 0}, "n_validation"),
        (NoveltyGA, {"k": 0}, "k"),
        (NoveltyGA, {"archive_prob": 1.5}, "archive_prob"),
        (NoveltyGA, {"archive_prob": math.nan}, "archive_prob"),
        (NoveltyGA, {"population_size": 1, "n_elite_candidates": 1, "truncation": 1}, "population_size"),
    ],
)
def test_arguments_out_of_range_are_refused(kind, arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        small(kind, **arguments)


def test_other_misuse_is_refused():
    with pytest.raises(ValueError, match="^model_or_shapes must be at least one parameter"):
        DeepGA([], sphere, 2, 1, n_elite_candidates=1)
    search = small()
    with pytest.raises(ValueError, match="tell must be preceded by ask"):
        search.tell([0.0] * 20)
    search.ask()
    with pytest.raises(ValueError, match=r"fitnesses must be of shape \(20,\)"):
        search.tell([0.0] * 19)
    assert search.history_ == []
    with pytest.raises(ValueError, match=r"init must be a function to vectors \(100,\)"):
        small(init=lambda generator: np.zeros(3)).step()
    with pytest.raises(ValueError, match="the function must be one that gives values"):
        small(fitness=lambda params, seeds: np.zeros(20), vectorized=True).step()
    with pytest.raises(ValueError, match="n_episodes must be"):
        search.evaluate(Genome(0), 0)
    for seed, mutations, name in ((-1, (), "seeds"), (2**32, (), "seeds"), (0, ((1, 0.0),), "sigma")):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            Genome(seed, mutations)
