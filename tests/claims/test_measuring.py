"""What all claims are measured with: workers, arms that are tuned alike, and paired differences."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from fairtrial.claims.arms import FIRST_TUNING_SEED, Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, relative_gaps, surely_above, surely_below


@pytest.fixture
def importable(monkeypatch):
    """This file, for workers."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


def threads(number: int) -> tuple[int, int, list[int]]:
    np.ones((4, 4)) @ np.ones((4, 4))
    return number, torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()]


def refuse(number: int) -> int:
    raise ValueError(f"{number} is refused")


def test_a_map_keeps_the_order_and_every_worker_has_one_thread_in_all_libraries(importable) -> None:
    said: list[str] = []
    found = Measure(2, said.append).map(threads, range(4))
    assert [number for number, _, _ in found] == [0, 1, 2, 3]
    for _, of_torch, pools in found:
        assert of_torch == 1
        assert pools
        assert set(pools) == {1}
    assert said[-1] == "threads: 4 of 4"


def test_what_goes_wrong_in_a_worker_comes_out(importable) -> None:
    with pytest.raises(ValueError, match="7 is refused"):
        Measure(1).map(refuse, [7])


class Here(Measure):
    """Without processes of its own."""

    def map(self, function, arguments):
        return [function(argument) for argument in arguments]


@dataclass(frozen=True)
class Setting:
    lr: float


def quality(run: Run[Setting]) -> dict[str, float]:
    """Best at a rate of 0.1 in validation; the test is told apart by its sign."""
    noise = np.random.default_rng(run.seed).normal(0, 0.01)
    sign = 1 if run.split == "validation" else -1
    return {"value": sign * (1 - abs(np.log10(run.setting.lr) + 1) + noise), "seed": run.seed}


def test_arms_are_tuned_on_validation_data_by_the_mean_over_seeds_that_evaluation_never_sees() -> None:
    grid = [Setting(lr) for lr in (0.01, 0.1, 1.0)]
    best = tune(Here(), quality, {"a": grid, "b": grid[::-1]}, seeds=3, score=lambda found: found["value"])
    assert best == {"a": Setting(0.1), "b": Setting(0.1)}
    found = evaluate(Here(), quality, {"a": Setting(0.1), "b": Setting(1.0)}, seeds=4)
    assert [each["seed"] for each in found["a"]] == [each["seed"] for each in found["b"]] == [0, 1, 2, 3]
    assert max(each["seed"] for each in found["a"]) < FIRST_TUNING_SEED
    assert all(a["value"] < b["value"] < 0.1 for a, b in zip(found["a"], found["b"], strict=True))


def test_arms_with_more_to_choose_among_than_others_are_refused() -> None:
    with pytest.raises(ValueError, match="grids must be of equal size"):
        tune(Here(), quality, {"a": [Setting(0.1)], "b": [Setting(0.1)] * 2}, seeds=1, score=lambda found: 0.0)


def test_differences_are_paired_and_corrected_over_all_that_are_asked_for() -> None:
    assert gaps([3.0, 5.0], [1.0, 6.0]) == [2.0, -1.0]
    assert relative_gaps([3.0, 3.0], [2.0, 4.0]) == [0.5, -0.25]
    six = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8]
    assert above_zero(six) == [True]
    assert above_zero([-value for value in six]) == [False]
    assert above_zero(six, six) == [False, False], "six seeds are too few for two"
    assert above_zero(six + six, six + six) == [True, True]
    with pytest.raises(ValueError, match="longer"):
        gaps([1.0], [1.0, 2.0])


def test_bounds_are_those_of_the_interval() -> None:
    values = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8]
    figure = measured("gain", values, "fraction", paper="2")
    assert (figure.low, figure.high) == (pytest.approx(0.8), pytest.approx(1.2))
    assert surely_above(values, 0.79)
    assert not surely_above(values, 0.81)
    assert surely_below(values, 1.21)
    assert not surely_below(values, 1.19)
    few = measured("gain", values[:5], "fraction")
    assert (few.low, few.high) == (None, None)
    assert not surely_above(values[:5], -100)
    assert single("ratio", 2, "times").value == 2.0
