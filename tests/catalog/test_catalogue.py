import subprocess
import sys
from dataclasses import replace
from datetime import date

import pytest

from fairtrial.catalog import CatalogError, Catalogue, Claim, Evidence, Finding, Machine, Paper, UnknownPaper

FAST = Claim("is-fast", "It is fast.", "40 times", "abstract", protocol="Time it.")
GOOD = Claim("is-good", "It is good.", "99 %", "abstract", protocol="Train it.")
SCALES = Claim("scales", "It scales.", "1e9 classes", "paper", untestable="needs 1e9 classes")
TOY = Paper(
    "toy_loss", "losses", "Toy Loss", date(2016, 4, 29), 2, "A loss.", "verified", (FAST, GOOD, SCALES), "1604.08859"
)
METHODS = {"toy_loss": ["fairtrial.methods.losses.ToyLoss"]}


def evidence(*findings: Finding) -> Evidence:
    versions = {"python": "3.11", "torch": "2.9", "fairtrial": "0.1"}
    return Evidence("toy_loss", date(2026, 11, 22), "0" * 16, 1.0, Machine("laptop", 2, 24.0), versions, findings)


REPRODUCED = Finding("is-fast", "reproduced", "more than 10 times")
NOT_REPRODUCED = Finding("is-good", "not reproduced", "above 90 %")


def test_listed():
    catalogue = Catalogue([TOY])
    assert catalogue.status("toy_loss") == "listed"
    assert catalogue.methods("toy_loss") == ()
    assert Catalogue([TOY], methods={"toy_loss": []}).status("toy_loss") == "listed"
    assert Catalogue([TOY], [evidence(REPRODUCED, NOT_REPRODUCED)]).status("toy_loss") == "listed"


def test_available():
    catalogue = Catalogue([TOY], methods=METHODS)
    assert catalogue.status("toy_loss") == "available"
    assert catalogue.methods("toy-loss") == METHODS["toy_loss"]
    assert catalogue.evidence("toy_loss") is None
    assert Catalogue([TOY], [evidence(REPRODUCED)], METHODS).status("toy_loss") == "available"


def test_checked():
    catalogue = Catalogue([TOY], [evidence(NOT_REPRODUCED, REPRODUCED)], METHODS)
    assert catalogue.status("toy_loss") == "checked"
    assert catalogue.evidence("toy_loss") == evidence(NOT_REPRODUCED, REPRODUCED)


def test_nothing_testable_is_not_checked_by_nothing():
    untestable = replace(TOY, claims=(SCALES,))
    assert Catalogue([untestable], methods=METHODS).status("toy_loss") == "available"


def test_claims():
    not_here = Finding("is-good", "not testable here", "above 90 %", note="no data")
    unmeasured, measured, excused = (
        [(status.verdict, status.reason, status.finding) for status in Catalogue([TOY], each).claims("toy_loss")]
        for each in ([], [evidence(REPRODUCED)], [evidence(not_here)])
    )
    scales = ("not testable here", "needs 1e9 classes", None)
    assert unmeasured == [("not checked", None, None), ("not checked", None, None), scales]
    assert measured == [("reproduced", None, REPRODUCED), ("not checked", None, None), scales]
    assert excused == [("not checked", None, None), ("not testable here", "no data", not_here), scales]
    assert [status.claim for status in Catalogue([TOY]).claims("toy_loss")] == [FAST, GOOD, SCALES]


@pytest.mark.parametrize(("fingerprint", "stale"), [("0" * 16, False), ("f" * 16, True), (None, True)])
def test_stale(fingerprint: str | None, stale: bool):
    catalogue = Catalogue([TOY], [evidence(REPRODUCED, NOT_REPRODUCED)], METHODS, lambda slug: fingerprint)
    assert catalogue.stale("toy_loss") is stale
    assert catalogue.status("toy_loss") == "checked"
    assert catalogue.claims("toy_loss")[0].finding == REPRODUCED


def test_not_known_to_be_stale():
    assert not Catalogue([TOY], [evidence(REPRODUCED)]).stale("toy_loss")
    assert not Catalogue([TOY], fingerprints=lambda slug: "f" * 16).stale("toy_loss")


def test_evidence_on_an_unknown_paper():
    with pytest.raises(
        CatalogError, match=r"^toy_los.json: paper: .* without a record, 'toy_los'; did you mean toy_loss?"
    ):
        Catalogue([TOY], [replace(evidence(REPRODUCED), paper="toy_los")])


def test_evidence_on_an_unknown_claim():
    unknown = replace(REPRODUCED, claim="was-fast")
    with pytest.raises(
        CatalogError, match=r"^toy_loss.json: findings\[1\].claim: 'was-fast' is .*; did you mean is-fast"
    ):
        Catalogue([TOY], [evidence(NOT_REPRODUCED, unknown)])


@pytest.mark.parametrize("spelling", ["toy_loss", "toy-loss", "Toy Loss", "TOY_LOSS", " toy_loss\n"])
def test_lookup(spelling: str):
    catalogue = Catalogue([TOY])
    assert catalogue[spelling] is TOY
    assert spelling in catalogue


def test_failed_lookup():
    catalogue = Catalogue([TOY])
    with pytest.raises(UnknownPaper) as refusal:
        catalogue["toyloss"]
    assert str(refusal.value) == "no paper 'toyloss'; did you mean toy_loss?"
    assert isinstance(refusal.value, CatalogError)
    assert isinstance(refusal.value, KeyError)
    assert "toyloss" not in catalogue
    assert catalogue.get("toyloss") is None
    for ask in (catalogue.methods, catalogue.evidence, catalogue.stale, catalogue.claims, catalogue.status):
        with pytest.raises(UnknownPaper):
            ask("z" * 99_999)


def test_shipped_lookups(shipped: Catalogue):
    assert shipped["Z-loss"].slug == "z_loss"
    with pytest.raises(UnknownPaper, match="no paper 'galor'; did you mean galore or q_galore"):
        shipped["galor"]
    with pytest.raises(UnknownPaper, match=f"no paper 'qqqq'; none of the {len(shipped)} known ones is near"):
        shipped["qqqq"]


def test_order():
    other = replace(TOY, slug="a_loss")
    assert list(Catalogue([TOY, other])) == ["a_loss", "toy_loss"]
    assert len(Catalogue([TOY, other])) == 2


def test_search_by_status():
    other = replace(TOY, slug="a_loss")
    catalogue = Catalogue([TOY, other], [evidence(REPRODUCED, NOT_REPRODUCED)], METHODS)
    assert catalogue.search("loss", status="checked") == [TOY]
    assert catalogue.search("loss", status="listed") == [other]
    assert catalogue.search("loss", status="available") == []


def test_loading_imports_no_torch():
    program = "import sys; from fairtrial.catalog import Catalogue; Catalogue.load(); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_loading_takes_methods_and_fingerprints():
    catalogue = Catalogue.load({"z_loss": ["fairtrial.methods.losses.ZLoss"]}, lambda slug: None)
    assert catalogue.status("z_loss") in ("available", "checked")
