from dataclasses import replace

import pytest
import torch

from fairtrial.contract import Choice
from fairtrial.methods.optimizers.deep_hedging import hedging_pnl
from fairtrial.tasks import load
from fairtrial.tasks.heston_hedging import COST, STRIKE, HedgingBook, HedgingTask, expected_shortfall, paths
from fairtrial.tasks.streams import Streams


def task() -> HedgingTask:
    found = load("heston-hedging")
    assert isinstance(found, HedgingTask)
    return found


def test_the_error_is_the_deals_profit_or_loss() -> None:
    x, y = paths(20, Streams(0)("paths"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        book = HedgingBook(4)
    S, V = x.unbind(2)
    pnl, _ = hedging_pnl(S, book.policy(S, V), STRIKE, COST, 2.287151)
    torch.testing.assert_close(book(x) - y, pnl, rtol=1e-4, atol=1e-4)


def test_parts_are_of_different_paths_and_stay_sums_of_money() -> None:
    division = task()._divide(Streams(0))
    assert [len(part.x) for part in division] == [4500, 1500, 4000]
    ends = [part.x[:, -1, 0] for part in division]
    assert len(torch.cat(ends).unique()) > 9900
    for part in division:
        assert (part.x[:, 0, 0] == STRIKE).all()
        torch.testing.assert_close(part.y, (part.x[:, -1, 0] - STRIKE).clamp(min=0))


def test_the_expected_shortfall_is_the_mean_of_the_worst() -> None:
    output, target = torch.zeros(40), torch.arange(40.0)
    assert expected_shortfall(output, target) == pytest.approx(38.5)


def test_runs_are_repeatable_and_hedging_is_learned() -> None:
    short = replace(task(), total_steps=40)
    choices = {"optimizer": Choice("KFAC", {"lr": 0.3})}
    short.check(choices)
    first, second = (short.run(choices, 1, split="test") for _ in range(2))
    assert (first.value, first.curve) == (second.value, second.curve)
    assert first.value < 0.8
