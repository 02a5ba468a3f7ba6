import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtrial import tasks
from fairtrial.contract import Costs, Metric, Outcome
from fairtrial.report.origin import Origin, origin
from fairtrial.report.page import page
from fairtrial.report.runs import runs_of, tunings_of
from fairtrial.trial.comparison import CostRatios, Stopping, compare
from fairtrial.trial.execute import Inline
from fairtrial.trial.store import Store

VOID = {"meta", "br"}
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
        "p",
        "div",
    ),
    *("span", "bdi", "ul", "li", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure"),
    *("details", "summary", "pre", "code", "br"),
    *("svg", "desc", "g", "path", "line", "circle", "rect", "text"),
}


class Read(HTMLParser):
    """Tags in order, whether they are balanced, what they say."""

    def __init__(self, document):
        super().__init__()
        self.open, self.tags, self.words, self.ids = [], [], [], []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(attributes) == len(dict(attributes)), (tag, attributes)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def check(document):
    """What holds for every page."""
    read = Read(document)
    assert {tag for tag, _ in read.tags} <= TAGS
    assert len(read.ids) == len(set(read.ids))
    for tag, attributes in read.tags:
        assert not {"src", "href", "action", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        if tag == "svg" and attributes.get("role") == "img":
            assert "viewbox" in attributes
    outside = re.sub(r"<style>.*?</style>", "", document, flags=re.DOTALL)
    assert not re.search(
        r"[ =(,](nan|inf)\b", " ".join(re.findall(r"<(?:path|line|circle|rect|text|svg)[^>]*>", outside))
    )
    assert "url(" not in document
    assert "@import" not in document
    named = re.findall(r'<svg [^>]*role="img"[^>]*><title>([^<]+)</title><desc>', document)
    assert len(named) == document.count('role="img"')
    return read


@pytest.fixture(scope="module")
def usual():
    return page(made.usual(), made.ORIGIN)


def test_the_page_stands_alone(usual):
    read = check(usual)
    assert "<script" not in usual
    assert "://" not in usual
    policy = dict(next(found for tag, found in read.tags if found.get("http-equiv")))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_equal_comparisons_give_equal_pages(usual):
    assert page(made.usual(), made.ORIGIN) == usual


def test_every_part_is_there(usual):
    read = check(usual)
    assert read.ids == ["verdicts", "differences", "curves", "costs", "tuning", "failures", "again"]
    labelled = [found["aria-labelledby"] for _, found in read.tags if "aria-labelledby" in found]
    assert labelled == read.ids
    for said in (
        "Better is better than A.",
        "Worse is worse than A.",
        "Alike is as good as A for all practical purposes.",
        "Broken is undecided.",
        "Broken: undecided; about 50 seeds would probably decide it.",
        "Broken: 3 of 8 runs failed and count with the worst value, 0 (the loss is infinite)",
        "fairtrial compare digits optimizer=A,B --trials 3 --seeds 8",
        "python 3.11.7",
        "0123abcd",
        "digits , version 1",
        "0–7 (test data)",
        "1000000–1000007 (validation data)",
        "seeds 1–2 diverged the loss is infinite",
        "seed 5 died RuntimeError: it broke",
    ):
        assert said in read.text, said


def test_verdicts_are_told_by_sign_and_word_not_by_colour_alone(usual):
    for said in ("▲ better", "▼ worse", "≈ equivalent", "? undecided"):
        assert usual.count(said) == 3  # in the table, and in the picture for each width


def test_pictures_show_what_they_are_made_of(usual):
    wide = re.search(r'<svg [^>]*class="wide-only".*?</svg>', usual, re.DOTALL)[0]
    narrow = re.search(r'<svg [^>]*class="narrow-only".*?</svg>', usual, re.DOTALL)[0]
    for drawn in (wide, narrow):
        assert drawn.count('class="mean"') == 4
        assert drawn.count('class="margin"') == 1
        assert drawn.count('class="dot"') == 32  # a dot for each seed of each method
    assert usual.count("<title>Learning curves of") == 4
    assert usual.count("<title>Tuning of") == 5
    assert len(re.findall(r"<title>[^<]* over optimizer\.(?:lr|kind)</title>", usual)) == 10
    history = re.search(r"<title>Tuning of Alike.*?</svg>", usual, re.DOTALL)[0]
    assert (history.count('class="run finished'), history.count('class="run open'), history.count("chosen")) == (
        16,
        8,
        16,
    )
    assert usual.count("relative to A</title>") == 2


def test_names_and_errors_are_escaped():
    evil = "<script>alert(1)</script>"
    cracked = "\"'><img src=x onerror=alert(1)>"
    error = f"Traceback\n{evil}\n\x00\x1b[31m\x85\ud800 {cracked} {{{{ 7 * 7 }}}}</pre>"
    values = [0.1 * n for n in range(8)]
    hostile = made.comparison(
        {
            f"A{evil}": [made.finished(v) for v in values],
            cracked: [
                made.failed(ended="died", error=error) if n < 2 else made.finished(v) for n, v in enumerate(values)
            ],
            "{{ c.task }}": [made.finished(v) for v in values],
        },
        task=f"{evil}</title></style>",
        metric=Metric("<b>&amp;", "maximize", "</svg><u>", 0.01, 0.0),
        slot='"<i>',
        tuned=lambda recipe, seeds: (
            [made.tuning(recipe, ({"<s>.<em>": "<q>"}, made.finished(0.5)), ({"<s>.<em>": "&"}, made.finished(0.4)))]
            * seeds
        ),
    )
    document = page(hostile, Origin(evil, {evil: cracked}, [evil, cracked]))
    read = check(document)
    assert evil in read.text
    assert "{{ c.task }}" in read.text
    assert "{{ 7 * 7 }}" in read.text
    assert "\x00" not in document
    assert "\x1b" not in document
    document.encode()


def test_text_is_readable_in_both_themes():
    style = (Path(page.__code__.co_filename).parent / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for theme in (light, dark):
        colour = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for name in ("ink", "soft", "baseline", "better", "worse", "equivalent", "undecided"):
            assert contrast(colour[name], colour["ground"]) >= 4.5, name
        for ground in ("caution", "failure", "raised"):
            assert contrast(colour["ink"], colour[ground]) >= 4.5


def contrast(one, other):
    """WCAG 2's contrast ratio."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_few_seeds_are_said_to_decide_nothing_and_the_interval_has_no_ends():
    few = made.comparison({"A": [made.finished(v) for v in (0.5, 0.6)], "B": [made.finished(v) for v in (0.7, 0.9)]})
    read = check(document := page(few, made.ORIGIN))
    assert "With 2 seeds no difference can be significant" in read.text
    assert "no bounded interval" in read.text
    assert 'class="interval unbounded"' in document
    assert document.count('class="tip"') == 4


def test_a_task_that_tells_little_gets_a_page_all_the_same():
    bare = {name: [Outcome(0.5)] * 8 for name in "AB"}
    found = made.comparison(bare, tuned=lambda recipe, seeds: [])
    silent = CostRatios(None, None, None, None)
    found = replace(found, recipes=[replace(judged, costs=silent) for judged in found.recipes])
    read = check(page(found, Origin("again", {})))
    for said in (
        "B is as good as A",
        "the task reports nothing while it trains",
        "The task reports neither step times nor memory.",
        "There was nothing to tune.",
        "None: every run finished.",
    ):
        assert said in read.text, said


def test_where_everything_failed_the_page_says_so():
    lost = made.comparison(
        {"A": [made.finished(0.5)] * 8, "B": [Outcome(0.0, "died", error=made.TRACEBACK)] * 8},
        tuned=lambda recipe, seeds: [made.tuning(recipe, *[({"optimizer.lr": 0.1}, made.failed())] * 3)] * seeds,
    )
    read = check(page(lost, made.ORIGIN))
    for said in (
        "B is worse than A.",
        "B: no run of 8 of its 8 tunings came through, so its methods' defaults stood (the loss is infinite)",
        "No run of 8 of 8 tunings came through: the methods’ defaults stood.",
        "24 tuning runs, for seeds 0–7",
        "seeds 0–7 died RuntimeError: it broke",
        "56 of 64",
    ):
        assert said in read.text, said


def test_a_single_tuning_for_all_seeds_is_told():
    once = made.usual(tuning_seeds=[1_000_000])
    read = check(page(once, made.ORIGIN))
    assert "Each recipe was tuned once, for all seeds" in read.text
    assert "Tuned to optimizer.lr = 0.01, optimizer.kind = soft." in read.text
    assert "3 for each recipe" in read.text
    assert len([run for run in runs_of(once) if run.phase == "tuning"]) == 15
    assert all(run.serves is None for run in runs_of(once) if run.phase == "tuning")


def test_recipes_that_were_decided_earlier_have_fewer_seeds():
    stopped = made.comparison(
        {
            "A": [made.finished(0.5 + n / 100) for n in range(12)],
            "Soon": [made.finished(0.7 + n / 100) for n in range(8)],
            "Late": [made.finished(0.5 + n / 90) for n in range(12)],
        },
        until_decided=Stopping(20, [8, 10, 12], 128, 112),
    )
    read = check(page(stopped, made.ORIGIN))
    assert "12 of at most 20" in read.text
    assert "20 at most: 128 runs, 112 fewer than the budget." in read.text
    assert "where they are fewer: Soon 8." in read.text
    assert "a mean over the recipe’s own seeds" in read.text
    assert [len(tunings_of(stopped, judged)) for judged in stopped.recipes] == [12, 8, 12]


def test_for_an_error_better_is_to_the_left():
    less = made.comparison(
        {"A": [made.finished(0.5)] * 8, "B": [made.finished(0.4)] * 8},
        metric=made.ERROR,
        tuned=lambda recipe, seeds: [],
    )
    document = page(less, made.ORIGIN)
    assert "B is better than A." in check(document).text
    assert "← better" in document
    assert "worse →" in document
    assert "↙ better and cheaper" in document


finite = st.floats(-1e9, 1e9)
endings = st.sampled_from(["finished", "diverged", "died", "lost"])
curves = st.lists(st.tuples(st.integers(0, 5000), finite), max_size=4, unique_by=lambda point: point[0]).map(sorted)
costs = st.builds(Costs, st.none() | st.floats(0, 10), st.none() | st.integers(0, 10**12), st.none(), st.none())
outcomes = st.builds(Outcome, finite, endings, st.just({}), curves, costs, st.none() | st.text(max_size=20))
ratios = st.none() | st.floats(1e-3, 1e3)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([made.ACCURACY, made.ERROR]), st.integers(1, 7), st.text(min_size=1, max_size=30))
def test_no_figures_break_the_page(data, metric, seeds, name):
    same = st.lists(outcomes, min_size=seeds, max_size=seeds)
    tried = st.lists(st.tuples(st.fixed_dictionaries({"a.b": finite | st.booleans() | st.text(max_size=5)}), outcomes))
    found = made.comparison(
        {"A": data.draw(same), f"B{name}": data.draw(same)},
        metric=metric,
        tuned=lambda recipe, n: [made.tuning(recipe, *data.draw(tried))],
        tuning_seeds=[7],
    )
    strange = CostRatios(data.draw(ratios), data.draw(ratios), None, None)
    baseline, other = found.recipes
    check(page(replace(found, recipes=[baseline, replace(other, costs=strange)]), made.ORIGIN))


def test_a_comparison_that_was_carried_out(tmp_path):
    with Inline(tasks.load) as executor, Store(tmp_path / "runs.db") as store:
        found = compare(
            tasks.load, "digits", {"optimizer": "AdamW,SGD(lr=0.1)"}, executor=executor, store=store, trials=2, seeds=2
        )
    read = check(page(found, origin(found, tasks.load)))
    for said in (
        "SGD(lr=0.1) against AdamW",
        "Tuned to optimizer.lr",
        "training step",
        "optimizer=AdamW,SGD(lr=0.1)",
        "scikit-learn",
    ):
        assert said in read.text, said


def test_many_seeds_keep_the_page_small():
    many = made.comparison(
        {name: [made.finished(0.5 + (n * k % 97) / 1000) for n in range(600)] for k, name in ((3, "A"), (7, "B"))}
    )
    document = page(many, made.ORIGIN)
    assert "Drawn are the first 40 of 600 tunings." in document
    assert len(document) < 1_000_000
