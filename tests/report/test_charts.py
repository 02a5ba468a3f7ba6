import math
from dataclasses import replace

import made
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairtrial.contract import Outcome
from fairtrial.report.axes import Axis, better_on_log, padded, reach, tick_text
from fairtrial.report.charts import band, curve_reach, intervals, paired, quality_against_cost
from fairtrial.report.svg import element, shortened, visible
from fairtrial.report.tuning_charts import sensitivity, tuning_history, value_axis
from fairtrial.trial.comparison import CostRatios


def test_an_axis_places_values_and_keeps_what_is_beyond_at_its_ends():
    axis = Axis(0.0, 10.0, 100, 200)
    assert [axis(value) for value in (0, 5, 10, -3, math.inf)] == [100, 150, 200, 100, 200]
    assert [axis.beyond(value) for value in (5, -3, 11)] == [0, -1, 1]
    log = Axis(0.01, 100.0, 0, 4, log=True)
    assert [log(value) for value in (0.01, 1, 100)] == pytest.approx([0, 2, 4])


def test_ticks_are_round_numbers():
    assert Axis(-0.021, 0.009, 0, 1).ticks(6) == [-0.02, -0.015, -0.01, -0.005, 0.0, 0.005]
    assert Axis(0.5, 8.5, 0, 1).ticks(8, whole=True) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert Axis(0.8, 3.2, 0, 1).ticks(5, whole=True) == [1, 2, 3]
    assert Axis(1e-4, 1e-1, 0, 1, log=True).ticks(5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert [tick_text(value) for value in (0.0, 0.005, 1000, 20_000, 3e6, 1e-7)] == [
        "0",
        "0.005",
        "1000",
        "20k",
        "3000k",
        "1e-07",
    ]


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 9), st.booleans())
def test_ticks_lie_on_the_axis_in_order_and_are_not_too_many(low, span, most, log):
    low = abs(low) + 1e-9 if log else low
    ticks = Axis(low, low + span, 0, 100, log).ticks(most) if low + span > low else []
    assert ticks == sorted(ticks)
    assert len(ticks) <= most + 2
    assert all(
        low - 1e-6 * abs(low) - 1e-9 * span <= tick <= (low + span) * (1 + 1e-6) + 1e-9 * span
        for tick in ticks
        if low > 0
    )


def test_an_axis_reaches_what_is_near_and_leaves_out_what_is_far():
    assert reach([1.0, 2.0], [2.5, 9.0, -0.5, -1.5], most=2.0) == (-0.5, 2.5)
    low, high = padded(3.0, 3.0)
    assert low < 3.0 < high
    low, high = padded(0.01, 1.0, log=True)
    assert 0 < low < 0.01
    assert high > 1.0


def test_the_kind_of_axis_follows_how_values_are_spread():
    rng = np.random.default_rng(0)
    for values, least in ((12, 0.85), (48, 0.98)):  # it is a guess, and a good one once there are some
        even = [better_on_log(rng.uniform(0.0, 20.0, values).tolist()) for _ in range(300)]
        decades = [better_on_log((10 ** rng.uniform(-4, -1, values)).tolist()) for _ in range(300)]
        assert np.mean(even) <= 1 - least
        assert np.mean(decades) >= least
    assert not better_on_log([0.0, 1.0, 100.0])
    assert not better_on_log([1.0, 2.0, 3.0])


def test_a_band_holds_the_quartiles_over_the_runs():
    steps, rows = band([made.finished(value) for value in (0.4, 0.5, 0.6, 0.7, 0.8)], worst=0.0)
    assert steps.tolist() == [10, 20, 30, 40]
    assert rows[:, -1].tolist() == pytest.approx([0.5, 0.6, 0.7])


def test_a_failed_run_counts_with_the_worst_value_from_where_it_broke_off():
    broken = Outcome(0.0, "diverged", curve=[(10, 0.3), (20, 0.3)])
    dead = Outcome(0.0, "died")
    steps, rows = band([made.finished(0.8), broken, dead], worst=0.0)
    assert steps.tolist() == [10, 20, 30, 40]
    assert rows[1].tolist() == pytest.approx([0.2, 0.3, 0.0, 0.0])
    assert band([dead], worst=0.0) is None


def test_a_run_that_reports_at_other_steps_is_read_between_them_and_not_beyond():
    coarse = Outcome(0.9, curve=[(20, 0.2), (40, 0.4)])
    fine = Outcome(0.9, curve=[(10, 0.1), (30, 0.3)])
    steps, rows = band([coarse, fine], worst=0.0)
    assert steps.tolist() == [10, 20, 30, 40]
    assert rows[1].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_curves_axis_may_leave_out_a_poor_start_and_the_worst_value():
    steps = np.array([10.0, 20.0, 30.0, 40.0])
    rows = np.array([[0.1, 0.9, 0.91, 0.92]] * 3)
    low, high = curve_reach([(steps, rows)], worst=0.0)
    assert 0.8 < low < 0.9
    assert high > 0.92
    rows = np.array([[0.1, 0.9, 0.0, 0.0]] * 3)
    low, _ = curve_reach([(steps, rows)], worst=0.0)
    assert low > 0.8


def test_every_seed_has_its_dot_however_many_are_equal():
    same = made.comparison({"A": [made.finished(0.5)] * 40, "B": [made.finished(0.6)] * 40})
    for wide in (True, False):
        assert intervals(same, wide).count('class="dot"') == 40
    assert paired(*reversed(same.recipes)) == pytest.approx([0.1] * 40)


def test_tuning_pictures_mark_what_was_pruned_failed_and_chosen():
    found = made.usual()
    judged = found.recipes[1]
    tuned = made.tuning(
        judged.recipe,
        ({"o.lr": 0.1}, made.finished(0.8)),
        ({"o.lr": 0.2}, made.pruned(0.75)),
        ({"o.lr": 0.3}, made.failed()),
        ({"o.lr": 0.4}, made.finished(0.9)),
        ({"o.lr": 0.5}, made.finished(0.01)),
    )
    up = value_axis([tuned], made.ACCURACY)
    for drawn in (
        tuning_history(judged, [tuned], up, made.ACCURACY),
        sensitivity(judged, [tuned], "o.lr", up, made.ACCURACY),
    ):
        assert drawn.count('class="run finished"') == 3
        assert drawn.count('class="run open"') == 1
        assert drawn.count('class="run cross"') == 1
        assert drawn.count('class="chosen"') == 1
        assert "accuracy 0.9000, finished, chosen</title>" in drawn
        assert "<desc>3 finished, 1 pruned, 1 diverged</desc>" in drawn


def test_the_first_of_equals_was_chosen():
    judged = made.usual().recipes[0]
    tuned = made.tuning(judged.recipe, ({"o.a": 1}, made.finished(0.8)), ({"o.a": 2}, made.finished(0.8)))
    drawn = tuning_history(judged, [tuned], value_axis([tuned], made.ACCURACY), made.ACCURACY)
    assert re_titles(drawn) == ["run 1: accuracy 0.8000, finished, chosen", "run 2: accuracy 0.8000, finished"]


def re_titles(drawn):
    return [part.split("</title>")[0] for part in drawn.split('finished"><title>')[1:]]


def test_costs_that_nobody_reports_are_not_drawn():
    assert quality_against_cost(made.usual(), "trainable_parameters", "weights") is not None
    found = made.comparison({"A": [Outcome(0.5)] * 6, "B": [Outcome(0.6)] * 6}, tuned=lambda recipe, seeds: [])
    silent = CostRatios(None, None, None, None)
    found = replace(found, recipes=[replace(judged, costs=silent) for judged in found.recipes])
    assert quality_against_cost(found, "step_time_ratio", "step time") is None


def test_what_goes_into_an_element_is_escaped():
    drawn = element("text", "<&>\x00", x=1.25, text_anchor='"', class_="a b", fill=None)
    assert drawn == '<text x="1.25" text-anchor="&#34;" class="a b">&lt;&amp;&gt;\ufffd</text>'
    assert visible("a\tb\nc\x7f\ud800\u202e\u2066é学") == "a\tb\nc" + 4 * "\ufffd" + "é学"
    assert shortened("abcdef", 4) == "abc…"
