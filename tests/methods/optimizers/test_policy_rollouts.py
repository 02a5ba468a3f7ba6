import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fairtrial.methods.optimizers import DeceptiveMaze, DeepGA, GymnasiumReturn, PendulumReturn, TanhPolicy
from fairtrial.methods.optimizers.deep_ga import fan_in_normal, generator_of

POLICY = TanhPolicy((3, 32, 32, 1))
SEEDS = np.array([[3, 4, 5], [3, 8, 9]])


def weights(policy, m, scale=1.0):
    init = fan_in_normal(policy.shapes, output_scale=scale)
    return torch.from_numpy(np.stack([init(generator_of(seed)) for seed in range(m)]))


def test_a_policy_is_a_torch_network_with_the_same_flat_weights():
    params = weights(POLICY, 2)
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    assert [tuple(p.shape) for p in model.parameters()] == POLICY.shapes
    observations = np.random.default_rng(0).normal(size=(2, 5, 3))
    found = POLICY.bind(params)(observations)
    for k in range(2):
        nn.utils.vector_to_parameters(params[k], model.parameters())
        with torch.no_grad():
            expected = model(torch.from_numpy(observations[k]).float())
        np.testing.assert_allclose(found[k], expected.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="params must be of shape"):
        POLICY.bind(params[:, 1:])
    with pytest.raises(ValueError, match="sizes must be"):
        TanhPolicy((3,))


@pytest.mark.parametrize("task", [PendulumReturn(steps=30), DeceptiveMaze(steps=30)])
def test_side_by_side_is_one_by_one(task):
    params = weights(task.policy, 2)
    together = task(params, SEEDS)
    parts = together if isinstance(together, tuple) else (together,)
    for k in range(2):
        for e in range(3):
            alone = task(params[k], int(SEEDS[k, e]))
            for part, single in zip(parts, alone if isinstance(alone, tuple) else (alone,), strict=True):
                np.testing.assert_allclose(part[k, e], single, rtol=1e-4)
    assert parts[0].shape == (2, 3)


def test_a_pendulum_that_nobody_moves():
    still = np.zeros((1, sum(math.prod(shape) for shape in POLICY.shapes)))
    found = PendulumReturn(steps=1)(still, np.arange(4)[None])
    starts = np.array([np.random.default_rng(seed).uniform((-np.pi, -1), (np.pi, 1)) for seed in range(4)])
    np.testing.assert_allclose(found[0], -(starts[:, 0] ** 2) - 0.1 * starts[:, 1] ** 2, rtol=1e-12)


def test_the_pendulum_is_gymnasiums():
    pytest.importorskip("gymnasium")
    params = weights(POLICY, 2, scale=3.0)
    theirs = GymnasiumReturn("Pendulum-v1")
    assert theirs.policy == POLICY
    np.testing.assert_allclose(PendulumReturn()(params, SEEDS), theirs(params, SEEDS), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "sizes"), [("CartPole-v1", (4, 2)), ("Acrobot-v1", (6, 3)), ("MountainCar-v0", (2, 3))]
)
def test_gymnasiums_environments(name, sizes):
    pytest.importorskip("gymnasium")
    task = GymnasiumReturn(name, hidden=(8,))
    assert task.policy == TanhPolicy((sizes[0], 8, sizes[1]))
    found = task(weights(task.policy, 2), SEEDS[:, :2])
    assert found.shape == (2, 2)
    if name == "CartPole-v1":
        assert (found == task(weights(task.policy, 2), SEEDS[:, :2])).all()
        assert (found >= 8).all()
        assert (found <= 500).all()
    else:
        assert (found >= -500).all()
        assert (found <= 0).all()


def test_cartpole_is_solved():
    pytest.importorskip("gymnasium")
    task = GymnasiumReturn("CartPole-v1", hidden=(8,))
    search = DeepGA(task.policy.shapes, task, 30, 5, 0.3, n_elite_candidates=2, n_validation=3, vectorized=True)
    while search.best_score_ < 400 and len(search.history_) < 8:
        search.step()
    assert search.best_score_ > 200


def towards(maze, direction, scale=100.0):
    """The weights of a policy that always goes in one direction."""
    flat = np.zeros((1, sum(math.prod(shape) for shape in maze.policy.shapes)))
    flat[0, -2:] = scale * np.array(direction)
    return flat


def test_who_heads_for_the_goal_is_trapped_and_walls_hold():
    maze = DeceptiveMaze()
    for direction, place in (
        ((0, 1), (0.5, 0.7)),
        ((0, -1), (0.5, 0.0)),
        ((1, 0), (1.0, 0.15)),
        ((-1, 0), (0.0, 0.15)),
        ((0.3, 1), (0.9, 0.7)),
    ):
        fitness, places = maze(towards(maze, direction), np.zeros((1, 1), dtype=int))
        np.testing.assert_allclose(places[0, 0], place, atol=maze.speed)
        assert fitness[0, 0] == -np.linalg.norm(places[0, 0] - maze.GOAL)
        assert not maze.reached(places[0, 0])
    trapped = maze(towards(maze, (0, 1)), np.zeros((1, 1), dtype=int))[0]
    beside = -np.linalg.norm(np.array([0.05, 0.7]) - maze.GOAL)
    assert trapped > beside, "the way around leads away from the goal"


def test_there_is_a_way_to_the_goal_and_the_robot_stays_there():
    maze = DeceptiveMaze()
    x, y = np.array([[maze.START[0]]]), np.array([[maze.START[1]]])
    moves = 0
    for target in ((0.05, 0.15), (0.05, 0.95), (0.4, 0.95), (0.4, 0.75), (0.7, 0.75), (0.7, 0.8)):
        while max(abs(target[0] - x), abs(target[1] - y)) > 1e-9:
            x = maze._across(x, y, np.clip(target[0] - x, -maze.speed, maze.speed))
            y = maze._along(x, y, np.clip(target[1] - y, -maze.speed, maze.speed))
            moves += 1
    assert maze.reached(np.stack([x, y], axis=-1)).all()
    assert moves <= maze.steps


def test_tasks_can_be_sent_to_workers():
    for task in (PendulumReturn(), DeceptiveMaze(), GymnasiumReturn("CartPole-v1")):
        assert pickle.loads(pickle.dumps(task)) == task
