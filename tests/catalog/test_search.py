import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairtrial.catalog import CatalogError, Catalogue, Claim, Paper

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine too


def found(catalogue: Catalogue, query: str) -> list[str]:
    return [paper.slug for paper in catalogue.search(query)]


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("galore", "galore"),
        ("GaLore", "galore"),
        ("galor", "galore"),
        ("gal", "galore"),
        ("galroe", "galore"),
        ("q-galore", "q_galore"),
        ("Q GaLore", "q_galore"),
        ("qgalore", "q_galore"),
        ("frugl", "frugal"),
        ("adampp", "adamp"),
        ("adam p", "adamp"),
        ("z loss", "z_loss"),
        ("z-loss", "z_loss"),
        ("zloss", "z_loss"),
        ("Z_LOSS", "z_loss"),
        ("kv prediction", "kv_prediction"),
        ("mirostatt", "mirostat"),
        ("double decent", "double_descent"),
        ("neural colapse", "neural_collapse"),
        ("galore xqzzyw", "galore"),
        ("2403.03507", "galore"),
        ("https://arxiv.org/abs/2403.03507v2", "galore"),
    ],
)
def test_first_found(shipped: Catalogue, query: str, slug: str):
    assert found(shipped, query)[0] == slug


@pytest.mark.parametrize("query", ["kv cash", "kv cache", "KV-cache", "kvcache", "kv cahce"])
def test_kv_cache(shipped: Catalogue, query: str):
    papers = shipped.search(query)
    assert len(papers) >= 3
    assert all(paper.family == "kvcache" for paper in papers[:3])


@pytest.mark.parametrize(
    ("query", "family"),
    [
        ("unlernign", "unlearning"),
        ("difusion", "diffusion"),
        ("federatd", "federated"),
        ("quantizat", "quantization"),
        ("quantisation", "quantization"),
    ],
)
def test_families_by_misspelt_words(shipped: Catalogue, query: str, family: str):
    assert family in [paper.family for paper in shipped.search(query)[:3]]


def test_every_paper_is_found_first_by_its_slug(shipped: Catalogue):
    for slug in shipped:
        for query in (slug, slug.replace("_", " "), slug.replace("_", "-").upper()):
            assert found(shipped, query)[0] == slug


def test_every_paper_is_found_by_its_title(shipped: Catalogue):
    for slug, paper in shipped.items():
        assert slug in found(shipped, paper.title)[:3]


def test_every_paper_is_found_while_its_slug_is_typed(shipped: Catalogue):
    for slug in shipped:
        typed = slug.replace("_", " ")
        for end in range(3, len(typed) + 1):
            assert slug in found(shipped, typed[:end]), (slug, typed[:end])


def test_british_and_american_spelling_find_the_same(shipped: Catalogue):
    for british, american in [
        ("optimiser", "optimizer"),
        ("quantisation", "quantization"),
        ("discretise", "discretize"),
    ]:
        assert found(shipped, british) == found(shipped, american)


def test_unknown_words_find_nothing(shipped: Catalogue):
    assert found(shipped, "xqzzyw") == []
    assert found(shipped, "2403.99999") == []


@pytest.mark.parametrize("query", ["", "  \n", '"', "'", "()", "***", "-", "🙂", "\x00", "\ud800", "_"])
def test_no_words_find_everything(shipped: Catalogue, query: str):
    assert found(shipped, query) == sorted(shipped)


quoted = [
    'galore"',
    '"galore',
    "'galore'",
    "galore*",
    "^galore",
    "galore)",
    "(galore",
    "+galore",
    "-galore",
    "{galore}",
]
odd = ["galore:", "galore\x00", "galore 🙂", "galore; --", "\ud800galore"]


@pytest.mark.parametrize("query", quoted + odd)
def test_punctuation_means_nothing(shipped: Catalogue, query: str):
    assert found(shipped, query) == found(shipped, "galore")


operators = [
    "AND",
    "OR",
    "NOT",
    "NEAR(a b)",
    "galore NOT galore",
    "slug:galore",
    "slug : ^ x",
    "papers",
    "rowid",
    "a AND",
]
injections = ["'; DROP TABLE papers; --", '" OR 1=1', "\x00galore", "%", "x\\", "a " * 9999, "z" * 99_999]
scripts = ["½ ² Ⅷ", "Ａ", "İ", "é e\u0301", "語"]


@pytest.mark.parametrize("query", operators + injections + scripts)
def test_operators_mean_nothing(shipped: Catalogue, query: str):
    assert len(found(shipped, query)) <= len(shipped)
    assert found(shipped, "galore")[0] == "galore"


@unhurried
@given(st.text() | st.text(st.sampled_from("galore zLOS*\"'()^:{}+-_ANDORT\x00éİ🙂½")))
def test_any_text_is_safe(shipped: Catalogue, query: str):
    slugs = found(shipped, query)
    assert len(slugs) == len(set(slugs))
    assert set(slugs) <= set(shipped)
    assert slugs == found(shipped, query)


def test_every_letter_is_safe(shipped: Catalogue):
    letters = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isalnum()]
    for letter in letters[::100]:
        found(shipped, f"{letter} {letter}x")


def test_filters(shipped: Catalogue):
    for paper in shipped.search("learning", family="losses"):
        assert paper.family == "losses"
    papers = shipped.search("", year=2024)
    assert papers == [paper for paper in shipped.values() if paper.date.year == 2024] != []
    assert shipped.search("", family="losses", year=1899) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"family": "loss"}, "unknown family 'loss'; did you mean losses"),
        ({"family": ""}, "unknown family ''; there is: losses, optimizers, "),
        ({"status": "check"}, "unknown status 'check'; did you mean checked?"),
    ],
)
def test_unknown_filters(shipped: Catalogue, asked: dict[str, str], message: str):
    with pytest.raises(CatalogError, match=message):
        shipped.search("galore", **asked)


def test_threads_share_a_catalogue(shipped: Catalogue):
    catalogue = Catalogue(shipped.values())
    queries = ["galore", "kv cash", "z loss", "optimizer", ""] * 20
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda query: found(catalogue, query), queries)) == [found(shipped, q) for q in queries]


def paper(slug: str, title: str = "A title", summary: str = "A summary.", statement: str = "It holds.") -> Paper:
    claim = Claim("holds", statement, "1", "abstract", protocol="Measure it.")
    return Paper(slug, "losses", title, date(2020, 1, 1), 1, summary, "verified", (claim,))


def test_ranking():
    catalogue = Catalogue(
        [
            paper("a", statement="Beats pruning, pruning and pruning."),
            paper("b", summary="Pruning, more pruning."),
            paper("c", title="Pruning"),
            paper("pruning"),
            paper("pruning_better", title="Pruning", summary="Pruning.", statement="Pruning."),
            paper("rest"),
        ]
    )
    assert found(catalogue, "pruning")[0] == "pruning"
    assert found(catalogue, "pruning")[-2:] == ["b", "a"]
    assert found(catalogue, "prune") == found(catalogue, "pruned")
    assert set(found(catalogue, "prune")) == {"a", "b", "c", "pruning", "pruning_better"}


def test_an_empty_catalogue():
    assert Catalogue([]).search("galore") == []
    assert Catalogue([]).search("") == []
