import re
from dataclasses import replace
from datetime import date

import pytest
from markdown_it import MarkdownIt

import layout
import paper_pages
from fairtrial import tasks
from fairtrial.catalog import Catalogue, Claim, Evidence, Finding, Machine, Measurement, Paper
from fairtrial.claims.code import checkable
from fairtrial.trial.recipe import check_recipes, recipes_for

EVIL = "<script>alert(1)</script> *a* _b_ [c](d) `e` | $f$ &amp; # {g} ~~h~~"
PAPER = Paper(
    "evil",
    "losses",
    f"Evil: {EVIL}",
    date(2020, 2, 3),
    1,
    EVIL,
    "memory",
    (
        Claim("one-claim", EVIL, EVIL, "abstract", protocol=EVIL),
        Claim("another", "too large", "7", "paper", untestable="needs more"),
        Claim("a-third", "not yet", "8", "code", protocol="try it"),
    ),
    arxiv="2002.00001",
)
FINDING = Finding("one-claim", "partly", EVIL, (0, 1, 2, 5), EVIL, (Measurement(EVIL, 0.12345, 0.1, 0.2, "points"),))


@pytest.fixture(scope="module")
def catalogue():
    return paper_pages.load()


def rendered(text):
    return MarkdownIt("commonmark").enable("table").render(text.partition("\n---\n")[2])


def words(html):
    return re.sub(r"<[^>]+>", "", html)


def test_what_records_and_evidence_say_is_shown_and_nothing_more(monkeypatch):
    monkeypatch.setattr(paper_pages, "_docstring", lambda path: "How it was done.")
    machine = Machine("a machine", 2, 24.0)
    evidence = Evidence("evil", date(2021, 1, 1), "0" * 16, 1234.5, machine, {"python": "3.11"}, (FINDING,))
    made = Catalogue([PAPER], [evidence], fingerprints=lambda slug: "1" * 16)
    page = paper_pages.paper_page(made, "evil")
    html = rendered(page)
    for tag in ("<script", "<em>", '<a href="d"', "<del>"):
        assert tag not in html
    shown = EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert words(html).count(shown) == 8
    assert "0.1235" in html
    assert "[0.1,\N{NO-BREAK SPACE}0.2]" in html
    assert "4 seeds: 0–2, 5." in html
    assert "in 1,234 s on 2 CPUs with" in html
    assert "!!! warning" in page
    assert [layout.badge(standing) in html for standing in ("partly", "not testable here", "not checked")] == [1] * 3
    assert "1 author " in html


def test_columns_without_a_figure_are_left_out():
    table = paper_pages.measured([Measurement("a", 1.0), Measurement("b", None, unit="s")])
    assert table.splitlines() == [
        "| measured here | value | unit |",
        "| --- | ---: | --- |",
        "| a | 1 |  |",
        "| b |  | s |",
    ]


def test_counts_are_of_every_claim(catalogue):
    page = paper_pages.verdict_page(catalogue)
    counts = [int(count) for count in re.findall(r"</span> \| (\d+) \|", page)]
    assert len(counts) == len(paper_pages.STANDINGS)
    assert sum(counts) == sum(len(paper.claims) for paper in catalogue.values())
    listed = page.partition("## Not reproduced")[2]
    assert listed.count("\n- ") == sum(counts[:3])


def test_a_catalogue_without_evidence_counts_nothing():
    page = paper_pages.verdict_page(Catalogue([PAPER]))
    assert "0 of them" in page
    assert page.count("None.") == 3


def test_the_list_has_every_paper(catalogue):
    page = paper_pages.index_page(catalogue)
    assert all(f"]({slug}.md) |" in page for slug in catalogue)


def test_code_on_paper_pages_works(catalogue):
    for slug in catalogue:
        for token in MarkdownIt().parse(paper_pages.paper_page(catalogue, slug)):
            if token.type == "fence" and token.info == "python":
                exec(token.content, {})
            if token.type == "fence" and token.info == "bash":
                for command in token.content.splitlines():
                    check(command.split())


def check(command):
    """That a command would work; carrying it out would take minutes."""
    match command:
        case ["fairtrial", "compare", task, choices]:
            slot, _, named = choices.partition("=")
            recipes = recipes_for(tasks.load(task), task, {slot: named})
            check_recipes(tasks.load(task), recipes)
            assert len(recipes) == named.count(",") + 1
        case ["fairtrial", "check", slug]:
            assert checkable(slug)
        case _:
            pytest.fail(f"what is {' '.join(command)}?")


@pytest.mark.parametrize(
    ("title", "short"),
    [("AdamP: Slowing Down", "AdamP"), ("No name here", "No name here"), (f"{'long ' * 9}: x", f"{'long ' * 9}: x")],
)
def test_short_titles(title, short):
    assert paper_pages.short_title(replace(PAPER, title=title)) == short
