from datetime import date
from itertools import pairwise

import pytest

import choice_pages
import paper_pages
from choice_pages import BITS, CACHES, GUIDES, OPTIMIZERS
from fairtrial.catalog import Catalogue, Claim, Evidence, Finding, Machine, Measurement, Paper
from fairtrial.methods.registry import index

EVIL = "<script>alert(1)</script> *a* |"
CLAIMS = tuple(Claim(name, "It is so.", "1", "paper", protocol="try it") for name in ("better", "also", "light"))
PAPER = Paper("adamp", "optimizers", "AdamP: A Title", date(2020, 2, 3), 1, "A summary.", "memory", CLAIMS)
FINDINGS = (
    Finding(
        "better",
        "partly",
        "It is.",
        (0, 1, 2),
        measurements=(
            Measurement("test accuracy, AdamP", 0.9, 0.8, 0.95, "fraction", paper="0.7"),
            Measurement("test accuracy, AdamW", 0.85, None, None, "fraction"),
            Measurement("test accuracy, AdamP above AdamW", 0.05, None, None, "fraction"),
            Measurement("test accuracy, nothing", None, None, None, "fraction"),
            Measurement("accuracy in float32", 0.7, None, None, "fraction"),
            Measurement("growth of the norm, AdamP", 3.0),
        ),
    ),
    Finding(
        "also",
        "reproduced",
        "It is.",
        measurements=(
            Measurement(f"test accuracy, {EVIL}", 0.7, None, None, "fraction"),
            Measurement("test accuracy, AdamP", 0.9, 0.8, 0.95, "fraction"),
            Measurement("test loss, AdamP", 0.1, None, None, "nats"),
        ),
    ),
    Finding(
        "light",
        "reproduced",
        "It is.",
        measurements=(
            Measurement("test accuracy, AdamP", 0.5, None, None, "fraction"),
            Measurement("test accuracy, SGD", 0.4, None, None, "fraction"),
            Measurement("bytes of optimizer states, AdamP", 8.0, None, None, "bytes"),
            Measurement("step with AdamP over AdamW's", 1.5, None, None, "ratio"),
        ),
    ),
)


def made():
    evidence = Evidence("adamp", date(2021, 1, 1), "0" * 16, 1.0, Machine("a machine", 2, 24.0), {}, FINDINGS)
    others = [Paper(e.paper, "optimizers", e.paper, date(2020, 2, 3), 1, "x", "memory", CLAIMS) for e in index()]
    return Catalogue([*others, PAPER], [evidence])


def test_what_was_measured_alike_stands_in_one_figure():
    found = choice_pages.figures(made(), OPTIMIZERS)
    assert [(figure.kind, figure.quantity, list(figure.measured)) for figure in found] == [
        ("quality", "test accuracy", ["AdamP", "AdamW", EVIL]),
        ("quality", "test accuracy", ["AdamP", "SGD"]),
        ("memory", "bytes of optimizer states", ["AdamP"]),
        ("step time", "step time", ["step with AdamP over AdamW's"]),
    ]
    assert [len(figure.findings) for figure in found] == [2, 1, 1, 1]
    assert [figure.more_is_better for figure in found] == [True, True, False, False]


def test_each_optimizer_stands_beside_its_baselines():
    catalogue = made()
    page = choice_pages.pages(catalogue)[OPTIMIZERS.address]
    (line,) = [line for line in page.splitlines() if line.startswith("| [AdamP]")]
    assert "test accuracy 0.9, AdamW 0.85<br> test accuracy 0.5, SGD 0.4 |" in line
    assert "1 partly" in line
    assert all(f"| [{entry.name}](" in page for entry in index() if entry.slot == "optimizer")


def test_pictures_say_what_they_show_and_nothing_gets_through():
    page = choice_pages.pages(made())[OPTIMIZERS.address]
    assert page.count("<svg ") == 4
    assert "AdamP: 0.9 [0.8, 0.95]; AdamW: 0.85" in page
    assert "<script" not in page


def test_a_method_goes_by_its_papers_name_too():
    finding = Finding(
        "better",
        "partly",
        "It is.",
        measurements=(
            Measurement("perplexity, RotateKV, 2 bits", 30.0),
            Measurement("perplexity, full cache, 2 bits", 14.0),
        ),
    )
    evidence = Evidence("rotatekv", date(2021, 1, 1), "0" * 16, 1.0, Machine("a machine", 2, 24.0), {}, (finding,))
    titles = {"rotatekv": "RotateKV: A Title"}
    papers = [
        Paper(e.paper, "kvcache", titles.get(e.paper, e.paper), date(2020, 2, 3), 1, "x", "memory", CLAIMS)
        for e in index()
    ]
    page = choice_pages.pages(Catalogue(papers, [evidence]))[CACHES.address]
    assert "perplexity 30 (2 bits), full cache 14 |" in page
    assert 'class="own"' in page


def test_what_an_arm_loses_against_one_reference_is_its_quality():
    measured = [
        Measurement("loss above the whole cache's, equal budgets, 20%", 0.4),
        Measurement("loss above the whole cache's, searched budgets, 20%", 0.3),
        Measurement("loss, equal above searched budgets, 20%", 0.1),
    ]
    finding = Finding("better", "partly", "It is.", measurements=tuple(measured))
    evidence = Evidence("prefixkv", date(2021, 1, 1), "0" * 16, 1.0, Machine("a machine", 2, 24.0), {}, (finding,))
    papers = [Paper(e.paper, "kvcache", e.paper, date(2020, 2, 3), 1, "x", "memory", CLAIMS) for e in index()]
    (figure,) = choice_pages.figures(Catalogue(papers, [evidence]), CACHES)
    assert list(figure.measured) == ["equal budgets, 20%", "searched budgets, 20%"]
    assert not figure.more_is_better


@pytest.mark.parametrize("wanted", [[30.0] * 9, [22.0, 23.0, 269.0, 270.0], [270.0] * 5, [100.0], []])
def test_labels_of_points_do_not_lie_on_each_other(wanted):
    places = choice_pages.apart(wanted, 22, 270)
    assert all(b - a >= choice_pages.LABEL for a, b in pairwise(places))
    assert all(22 <= place <= 270 for place in places)


def test_without_evidence_the_page_says_so():
    page = choice_pages.page(Catalogue(dict(paper_pages.load()).values()), OPTIMIZERS, [])
    assert page.count("Nothing is on record yet.") == 3


def test_quality_stands_against_memory_where_both_were_measured():
    arms = {"RoundToNearest": (4.5, 1.4), "GWQ": (3.8, 1.5), f"float {EVIL}": (32.0, 1.3)}
    measured = [
        Measurement(f"{quantity}, {arm}", value)
        for arm, values in arms.items()
        for quantity, value in zip(("bits per weight", "loss"), values, strict=True)
    ]
    finding = Finding("better", "partly", "It is.", (0, 1), measurements=tuple(measured))
    evidence = Evidence("gwq", date(2021, 1, 1), "0" * 16, 1.0, Machine("a machine", 2, 24.0), {}, (finding,))
    papers = [Paper(e.paper, "quantization", e.paper, date(2020, 2, 3), 1, "x", "memory", CLAIMS) for e in index()]
    catalogue = Catalogue(papers, [evidence])
    found = choice_pages.figures(catalogue, BITS)
    ((memory, quality),) = choice_pages.tradeoffs(found, "gwq")
    assert (memory.quantity, quality.quantity) == ("bits per weight", "loss")
    page = choice_pages.pages(catalogue)[BITS.address]
    assert "## Quality against memory" in page
    assert "GWQ: 3.8, 1.5" in page
    assert "<script" not in page
    assert {guide.address for guide in GUIDES} == choice_pages.pages(catalogue).keys()
