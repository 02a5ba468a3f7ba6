"""What every registered learning-rate schedule must do, whatever its shape."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, SequentialLR

from fairtrial.methods.registry import index

TOTAL = 60
BASE_RATES = (0.5, 0.02)


def in_periods(ends, decayed, shape):
    """1, but in the last so many steps of each period the `shape` of the share of them that has been taken."""

    def factor(step):
        end, count = next((end, count) for end, count in zip(ends, decayed, strict=True) if step < end)
        return shape((step - (end - count) + 1) / count) if step >= end - count else 1.0

    return factor


# each schedule's rate, relative to the base rate, as a function of the step in a run of TOTAL steps
CLOSED_FORMS = {
    "WSDSLR": in_periods([15, 30, 60], [1, 1, 3], lambda share: 1 / (1 - share + share / 0.1)),
    "WSDLR": in_periods([60], [6], lambda share: 1 / (1 - share + share / 0.1)),
    "CyclicCosineLR": in_periods(
        [15, 30, 60], [15, 15, 30], lambda share: 0.1 + 0.9 * math.cos(math.pi * share / 2) ** 2
    ),
    "LinearDecayLR": lambda step: 1 - (step + 1) / TOTAL,
}

schedules = pytest.mark.parametrize("entry", [e for e in index() if e.slot == "schedule"], ids=lambda e: e.name)


def new_optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in BASE_RATES]
    return torch.optim.AdamW(groups, lr=1.0)


def new_schedule(entry, optimizer, **hyperparameters):
    method = entry.load()
    return method.factory(optimizer=optimizer, **(method.bind(SimpleNamespace(total_steps=TOTAL)) | hyperparameters))


def step(optimizer, scheduler):
    optimizer.step()
    scheduler.step()


def group_rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def take_rates(optimizer, scheduler, steps):
    taken = []
    for _ in range(steps):
        taken.append(group_rates(optimizer))
        step(optimizer, scheduler)
    return taken


def all_rates(entry):
    optimizer = new_optimizer()
    return take_rates(optimizer, new_schedule(entry, optimizer), TOTAL)


@schedules
def test_rates_are_finite_and_between_zero_and_the_base_rate(entry):
    optimizer = new_optimizer()
    assert isinstance(new_schedule(entry, optimizer), LRScheduler)
    rates = np.array(all_rates(entry))
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert (rates <= np.array(BASE_RATES) * (1 + 1e-12)).all()
    assert (rates > 0).any()


@schedules
def test_groups_keep_the_ratio_of_their_base_rates(entry):
    rates = np.array(all_rates(entry)) / BASE_RATES
    np.testing.assert_allclose(rates[:, 0], rates[:, 1], rtol=1e-12)


@schedules
def test_last_lr_is_what_the_optimizer_uses(entry):
    optimizer = new_optimizer()
    scheduler = new_schedule(entry, optimizer)
    for _ in range(TOTAL):
        assert scheduler.get_last_lr() == group_rates(optimizer)
        step(optimizer, scheduler)


@schedules
@pytest.mark.parametrize("serialise", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_state_dict_resumes_at_any_step(entry, serialise):
    optimizer = new_optimizer()
    scheduler = new_schedule(entry, optimizer)
    expected = all_rates(entry)
    for start in range(TOTAL):
        if start % 10 == 0:
            state, optimizer_state = serialise(scheduler.state_dict()), serialise(optimizer.state_dict())
            fresh = new_optimizer()
            resumed = new_schedule(entry, fresh)
            fresh.load_state_dict(optimizer_state)
            resumed.load_state_dict(state)
            assert take_rates(fresh, resumed, TOTAL - start) == expected[start:]
        step(optimizer, scheduler)


@schedules
def test_a_state_dict_is_loadable_without_running_code(entry, tmp_path):
    scheduler = new_schedule(entry, new_optimizer())
    torch.save(scheduler.state_dict(), tmp_path / "schedule.pt")
    assert torch.load(tmp_path / "schedule.pt", weights_only=True) == scheduler.state_dict()


@schedules
def test_every_step_has_the_rate_of_the_closed_form(entry):
    assert entry.name in CLOSED_FORMS, "write down the schedule's rates in CLOSED_FORMS"
    expected = [[rate * CLOSED_FORMS[entry.name](number) for rate in BASE_RATES] for number in range(TOTAL)]
    np.testing.assert_allclose(all_rates(entry), expected, rtol=1e-12)


@schedules
def test_the_rate_of_a_step_does_not_depend_on_how_it_was_reached(entry):
    expected = all_rates(entry)
    for start in range(1, TOTAL):
        optimizer = new_optimizer()
        for group, rate in zip(optimizer.param_groups, BASE_RATES, strict=True):
            group["initial_lr"] = rate
        new_schedule(entry, optimizer, last_epoch=start - 1)
        np.testing.assert_allclose(group_rates(optimizer), expected[start], rtol=1e-12)


@schedules
def test_it_chains_in_a_sequence(entry):
    optimizer = new_optimizer()
    first = ConstantLR(optimizer, factor=0.25, total_iters=100)
    chain = SequentialLR(optimizer, [first, new_schedule(entry, optimizer)], milestones=[7])
    rates = take_rates(optimizer, chain, 7 + TOTAL)
    np.testing.assert_allclose(rates[:7], [[0.25 * rate for rate in BASE_RATES]] * 7)
    np.testing.assert_allclose(rates[7:], all_rates(entry), rtol=1e-12)


@schedules
def test_in_a_sequence_another_schedule_may_follow_at_any_time(entry):
    for milestone in (1, TOTAL // 2, TOTAL):
        optimizer = new_optimizer()
        last = ConstantLR(optimizer, factor=0.25, total_iters=TOTAL)
        chain = SequentialLR(optimizer, [new_schedule(entry, optimizer), last], milestones=[milestone])
        rates = take_rates(optimizer, chain, milestone + 7)
        np.testing.assert_allclose(rates[:milestone], all_rates(entry)[:milestone], rtol=1e-12)
        np.testing.assert_allclose(rates[milestone:], [[0.25 * rate for rate in BASE_RATES]] * 7)


@schedules
def test_a_sequence_resumes_from_its_state_dict(entry):
    def chained():
        optimizer = new_optimizer()
        parts = [new_schedule(entry, optimizer), new_schedule(entry, optimizer)]
        return optimizer, SequentialLR(optimizer, parts, milestones=[TOTAL // 2])

    expected = take_rates(*chained(), TOTAL)
    for start in (0, TOTAL // 2 - 1, TOTAL // 2, TOTAL - 1):
        optimizer, chain = chained()
        take_rates(optimizer, chain, start)
        fresh, resumed = chained()
        fresh.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(chain.state_dict())
        assert take_rates(fresh, resumed, TOTAL - start) == expected[start:]


@schedules
def test_past_the_end_the_rate_stays_finite_and_warnings_do_not_pile_up(entry):
    optimizer = new_optimizer()
    scheduler = new_schedule(entry, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take_rates(optimizer, scheduler, TOTAL)
        assert caught == []
        rates = np.array(take_rates(optimizer, scheduler, TOTAL))
        assert len(caught) <= 1
        assert np.isfinite(rates).all()
        assert (rates >= 0).all()
        fresh = new_optimizer()
        resumed = new_schedule(entry, fresh)
        fresh.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        assert take_rates(fresh, resumed, 5) == take_rates(optimizer, scheduler, 5)


@schedules
def test_no_global_random_state_is_touched(entry):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    all_rates(entry)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@schedules
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_very_short_runs_are_possible(entry, total):
    method = entry.load()
    optimizer = new_optimizer()
    scheduler = method.factory(optimizer=optimizer, **method.bind(SimpleNamespace(total_steps=total)))
    assert np.isfinite(take_rates(optimizer, scheduler, total)).all()
