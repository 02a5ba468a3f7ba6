import json

import calibration_tables

SHARE = {"count": 337, "of": 10_000, "rate": 0.0337, "low": 0.03025, "high": 0.03743}
FIXED = {"pool": "as measured", "design": "fixed", "seeds": 10, **SHARE}
STOPPED = {"pool": "as measured", "design": "until decided", "seeds": 40, **SHARE}
TAILS = {**FIXED, "pool": "heavy tails | [1]"}
RECORD = {
    "task": "digits",
    "trials": 8,
    "runs": 400,
    "metric": {"name": "accuracy"},
    "mean": 0.959478,
    "standard_deviation": 0.00541005,
    "distinct": 11,
    "failed": 0,
    "comparisons": 10_000,
    "with_effect": 5000,
    "misses": ["intervals are wider than need be"],
    "date": "2026-11-22",
    "machine": {"cpus": 2, "class": "Linux x86_64"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "false_verdicts": [
        {**FIXED, "methods": 1},
        {**FIXED, "methods": 3},
        {**STOPPED, "methods": 1},
        {**TAILS, "methods": 3},
    ],
    "power": [
        {**FIXED, "methods": 1, "effect": 0.5, "computed": 0.5623},
        {**STOPPED, "methods": 1, "effect": 1.0, "computed": None},
        {**TAILS, "methods": 3, "effect": 1.0, "computed": 0.3},
    ],
    "coverage": [{**FIXED, "spread": 1}, {**STOPPED, "spread": 1}, {**FIXED, "spread": 2}],
    "savings": [
        {**SHARE, "effect": 1.0, "budget": 40, "median_seeds": 10.0, "fixed_seeds": 25, "ratio": 0.4},
    ],
}
CELL = "3.4 % \\[3.0,\N{NO-BREAK SPACE}3.7\\]"


def page(folder):
    return calibration_tables.with_figures(f"before {calibration_tables.MARK} after", folder)


def test_figures_stand_where_the_mark_was(tmp_path):
    (tmp_path / "digits.json").write_text(json.dumps(RECORD))
    made = page(tmp_path)
    assert made.startswith("before ### digits, tuned")
    assert made.endswith(" after")
    lines = made.splitlines()
    for line in (
        "- intervals are wider than need be",
        "| pool | seeds | 1 method | 3 methods |",
        f"| as measured | 10 | {CELL} | {CELL} |",
        f"| as measured | up to 40 | {CELL} |  |",
        f"| heavy tails \\| \\[1\\] | 10 |  | {CELL} |",
        f"| as measured | 10 | 1 method | {CELL} (56) |  |",
        f"| as measured | up to 40 | 1 method |  | {CELL} |",
        f"| as measured, a method that spreads 2 × as far | {CELL} |  |",
        f"| 1 | 40 seeds | {CELL} | 10 seeds | 25 seeds | 40% |",
    ):
        assert line in lines, line
    assert "400 runs of the baseline, each with a tuning of its own by 8 runs: accuracy" in made
    assert "as it should be." not in made


def test_without_a_record_the_page_says_so(tmp_path):
    assert page(tmp_path) == "before No calibration is recorded yet.\n after"


def test_nothing_amiss_is_told(tmp_path):
    (tmp_path / "digits.json").write_text(json.dumps({**RECORD, "misses": [], "trials": 0}))
    assert "Every figure is as it should be." in page(tmp_path)
