"""Policies as flat vectors of weights, and what they earn: many policies and many episodes at once, in NumPy.

Everywhere weights are (m, p) of m policies, episode seeds (m, e), and what comes out (m, e). A single policy and a
single seed may come without their dimensions; the result then is without them, too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import ndarray

from fairtrial.methods.arguments import require


@dataclass(frozen=True)
class TanhPolicy:
    """A perceptron with tanh in its hidden layers and linear outputs.

    Args:
        sizes: of the layers, inputs first and outputs last.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.sizes) >= 2 and min(self.sizes) >= 1, "sizes", self.sizes, "two sizes at least, all above 0")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters in their order, as PyTorch has them: weight and bias of each layer."""
        return [shape for inputs, outputs in pairwise(self.sizes) for shape in ((outputs, inputs), (outputs,))]

    def bind(self, params: Any) -> Callable[[ndarray], ndarray]:
        """For weights (m, p) the function from observations (m, e, inputs) to outputs (m, e, outputs)."""
        flat, layers, start = np.asarray(params), [], 0
        for inputs, outputs in pairwise(self.sizes):
            weight = flat[:, start : start + inputs * outputs].reshape(-1, outputs, inputs).transpose(0, 2, 1)
            start += inputs * outputs
            layers.append((np.ascontiguousarray(weight), flat[:, None, start : start + outputs]))
            start += outputs
        require(flat.shape[1:] == (start,), "params", flat.shape, f"of shape (policies, {start})")

        def act(observations: ndarray) -> ndarray:
            h = observations.astype(flat.dtype, copy=False)
            for weight, bias in layers[:-1]:
                h = np.tanh(h @ weight + bias)
            outputs: ndarray = h @ layers[-1][0] + layers[-1][1]
            return outputs

        return act


def _batched(params: Any, episode_seeds: Any) -> tuple[ndarray, ndarray]:
    return np.atleast_2d(np.asarray(params)), np.atleast_2d(np.asarray(episode_seeds))


def _like(found: ndarray, episode_seeds: Any) -> Any:
    """Without the dimensions that the seeds came without."""
    return np.reshape(found, (*np.shape(episode_seeds), *found.shape[2:]))


@dataclass(frozen=True)
class PendulumReturn:
    """The return of policies that swing up a pendulum: gymnasium's Pendulum-v1, number for number.

    Observations are (cos θ, sin θ, dθ/dt), the torque is 2 tanh of the output, and a step costs θ² + 0.1 (dθ/dt)² +
    0.001 torque², with θ = 0 upright. A seed gives the start that `reset(seed=…)` gives.

    Args:
        policy: with 3 inputs and 1 output.
        steps: of an episode.
    """

    policy: TanhPolicy = TanhPolicy((3, 32, 32, 1))
    steps: int = 200

    def __call__(self, params: Any, episode_seeds: Any) -> Any:
        flat, seeds = _batched(params, episode_seeds)
        act = self.policy.bind(flat)
        start = [np.random.default_rng(seed).uniform((-np.pi, -1.0), (np.pi, 1.0)) for seed in seeds.flat]
        angle, speed = np.moveaxis(np.reshape(start, (*seeds.shape, 2)), -1, 0)
        total = np.zeros(seeds.shape)
        for _ in range(self.steps):
            observation = np.stack([np.cos(angle), np.sin(angle), speed], axis=-1)
            torque = 2 * np.tanh(act(observation)[..., 0])
            off = (angle + np.pi) % (2 * np.pi) - np.pi
            total -= off**2 + 0.1 * speed**2 + 0.001 * torque**2
            speed = np.clip(speed + (15 * np.sin(angle) + 3 * torque) * 0.05, -8, 8)
            angle = angle + speed * 0.05
        return _like(total, episode_seeds)


@dataclass(frozen=True)
class DeceptiveMaze:
    """Where policies steer a point robot, from whose start the goal lies behind a trap in the shape of a U.

    In the unit square the robot starts below the open side of the U, and the goal is just above its closed side: who
    heads for the goal gets stuck inside, close to it. The way there leads through the gap at the left of the U and then
    over one wall and under another. Observations are the position, scaled to [-1, 1], and the velocity is `speed` times
    tanh of the outputs. Walls stop moves that would cross them. At the goal the robot stays. Nothing is drawn: seeds
    count only by their number.

    Fitness is minus the distance between the last place and the goal; the behaviour is that place.

    Args:
        policy: with 2 inputs and 2 outputs.
        steps: of an episode.
        speed: the longest move in a step and direction.
    """

    policy: TanhPolicy = TanhPolicy((2, 16, 16, 2))
    steps: int = 100
    speed: float = 0.05

    START, GOAL, REACHED = (0.5, 0.15), (0.7, 0.8), 0.05  # how near to the goal is at the goal
    UPRIGHT = ((0.1, 0.3, 0.7), (0.9, 0.3, 0.7), (0.3, 0.7, 0.9), (0.5, 0.8, 1.0))  # walls: x, and y from and to
    LEVEL = ((0.7, 0.1, 1.0),)  # y, and x from and to

    def __call__(self, params: Any, episode_seeds: Any) -> tuple[Any, Any]:
        """Fitness (m, e), and behaviours (m, e, 2)."""
        flat, seeds = _batched(params, episode_seeds)
        act = self.policy.bind(flat)
        x, y = (np.full(seeds.shape, start) for start in self.START)
        for _ in range(self.steps):
            moves = self.speed * np.tanh(act(np.stack([2 * x - 1, 2 * y - 1], axis=-1)))
            free = ~self.reached(np.stack([x, y], axis=-1))
            x = self._across(x, y, free * moves[..., 0])
            y = self._along(x, y, free * moves[..., 1])
        places = np.stack([x, y], axis=-1)
        return _like(-self._distance(places), episode_seeds), _like(places, episode_seeds)

    def reached(self, places: Any) -> Any:
        """Whether places (…, 2) are at the goal."""
        return self._distance(places) <= self.REACHED

    def _distance(self, places: Any) -> Any:
        return np.linalg.norm(np.asarray(places) - self.GOAL, axis=-1)

    def _across(self, x: ndarray, y: ndarray, move: ndarray) -> ndarray:
        return _stopped(x, y, move, self.UPRIGHT)

    def _along(self, x: ndarray, y: ndarray, move: ndarray) -> ndarray:
        return _stopped(y, x, move, self.LEVEL)


def _stopped(at: ndarray, beside: ndarray, move: ndarray, walls: Iterable[tuple[float, float, float]]) -> ndarray:
    """Where a move along one coordinate ends; it is not made at all if a wall is in its way."""
    moved: ndarray = np.clip(at + move, 0, 1)
    for wall, start, end in walls:
        crossing = (beside >= start) & (beside <= end) & ((at - wall) * (moved - wall) <= 0)
        moved = np.where(crossing, at, moved)
    return moved


@dataclass(frozen=True)
class GymnasiumReturn:
    """The return of policies in a gymnasium environment, such as CartPole-v1, all episodes side by side.

    A discrete action is the largest output; a continuous one is tanh of the outputs, scaled to the bounds.

    Args:
        environment: its id.
        hidden: sizes of the hidden layers of the policy.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: observations or actions are not plain vectors or choices.
    """

    environment: str
    hidden: tuple[int, ...] = (32, 32)

    @property
    def policy(self) -> TanhPolicy:
        """As many inputs and outputs as the environment has."""
        env = _gymnasium().make(self.environment)
        observation, action = env.observation_space.shape, env.action_space
        env.close()
        known = len(observation or ()) == 1 and (hasattr(action, "n") or len(action.shape or ()) == 1)
        require(known, "environment", self.environment, "one that observes vectors and takes choices or vectors")
        return TanhPolicy((observation[0], *self.hidden, int(action.n) if hasattr(action, "n") else action.shape[0]))

    def __call__(self, params: Any, episode_seeds: Any) -> Any:
        flat, seeds = _batched(params, episode_seeds)
        act = self.policy.bind(flat)
        envs = _gymnasium().make_vec(self.environment, num_envs=seeds.size, vectorization_mode="sync")
        space = envs.single_action_space
        observation, _ = envs.reset(seed=[int(seed) for seed in seeds.flat])
        total, running = np.zeros(seeds.size), np.ones(seeds.size, dtype=bool)
        while running.any():
            outputs = act(observation.reshape(*seeds.shape, -1)).reshape(seeds.size, -1)
            if hasattr(space, "n"):
                actions = outputs.argmax(1)
            else:
                actions = space.low + (np.tanh(outputs) + 1) / 2 * (space.high - space.low)
            observation, reward, terminated, truncated, _ = envs.step(actions)
            total += reward * running
            running &= ~(terminated | truncated)
        envs.close()
        return _like(total.reshape(seeds.shape), episode_seeds)


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("environments need the package gymnasium: pip install 'fairtrial[rl]'") from error
    return gymnasium
