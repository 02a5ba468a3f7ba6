"""The catalogue: papers, what there is to use of each, and what was measured here of what it claims."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from fairtrial.spelling import nearest

from . import evidence as recorded
from . import records
from .evidence import Evidence, Finding, Verdict
from .fields import CatalogError
from .records import FAMILIES, Claim, Paper
from .search import Index

Status = Literal["listed", "available", "checked"]
STATUSES: tuple[Status, ...] = get_args(Status)


class UnknownPaper(CatalogError, KeyError):
    """There is no paper of that name."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


@dataclass(frozen=True)
class ClaimStatus:
    """Where a claim stands.

    Attributes:
        claim: what the paper says.
        verdict: of the recorded evidence; without any, whether the claim is not testable here or just not checked.
        reason: why it is not testable here, if so.
        finding: the evidence.
    """

    claim: Claim
    verdict: Verdict | Literal["not checked"]
    reason: str | None
    finding: Finding | None


class Catalogue(Mapping[str, Paper]):
    """The papers by slug; `catalogue["Z-loss"]` finds `z_loss` too."""

    def __init__(
        self,
        papers: Iterable[Paper],
        evidence: Iterable[Evidence] = (),
        methods: Mapping[str, Sequence[str]] = {},
        fingerprints: Callable[[str], str | None] | None = None,
    ) -> None:
        """
        Args:
            papers: the records.
            evidence: what was measured of them.
            methods: what a person can use of each paper.
            fingerprints: the present fingerprint of the code that a paper's evidence depends on, None if there is no
                such code any more; without this, no evidence is known to be stale.
        """
        self._papers = {paper.slug: paper for paper in sorted(papers, key=lambda paper: paper.slug)}
        self._evidence = {each.paper: each for each in evidence}
        self._methods = methods
        self._fingerprints = fingerprints
        for each in self._evidence.values():
            self._check(each)

    @classmethod
    def load(
        cls,
        methods: Mapping[str, Sequence[str]] = {},
        fingerprints: Callable[[str], str | None] | None = None,
    ) -> "Catalogue":
        """The catalogue of all shipped records and evidence; the arguments are those of the class."""
        return cls(records.load(), recorded.load().values(), methods, fingerprints)

    def __getitem__(self, slug: str) -> Paper:
        spelt = str(slug).strip().lower().replace("-", "_").replace(" ", "_")
        if spelt not in self._papers:
            raise UnknownPaper(f"no paper {str(slug)[:80]!r}; {nearest(spelt, self._papers)}")
        return self._papers[spelt]

    def __iter__(self) -> Iterator[str]:
        return iter(self._papers)

    def __len__(self) -> int:
        return len(self._papers)

    def methods(self, slug: str) -> Sequence[str]:
        """What there is to use of a paper."""
        return self._methods.get(self[slug].slug, ())

    def evidence(self, slug: str) -> Evidence | None:
        """What was measured of a paper, stale or not."""
        return self._evidence.get(self[slug].slug)

    def stale(self, slug: str) -> bool:
        """Whether a paper's evidence was measured with code other than the present."""
        evidence = self.evidence(slug)
        if evidence is None or self._fingerprints is None:
            return False
        return evidence.fingerprint != self._fingerprints(evidence.paper)

    def claims(self, slug: str) -> tuple[ClaimStatus, ...]:
        """Where each claim of a paper stands."""
        evidence = self.evidence(slug)
        findings = {finding.claim: finding for finding in evidence.findings} if evidence else {}
        return tuple(_claim_status(claim, findings.get(claim.id)) for claim in self[slug].claims)

    def status(self, slug: str) -> Status:
        """'listed': there is its record; 'available': and methods; 'checked': and evidence on every testable claim."""
        if not self.methods(slug):
            return "listed"
        unchecked = any(status.verdict == "not checked" for status in self.claims(slug))
        # A paper none of whose claims can be tested here has not been checked by having no evidence.
        return "available" if unchecked or self.evidence(slug) is None else "checked"

    def search(
        self, query: str, family: str | None = None, year: int | None = None, status: str | None = None
    ) -> list[Paper]:
        """The papers that a query means, best first, or all by slug if it is empty; only those asked for."""
        _check_option("family", family, FAMILIES)
        _check_option("status", status, STATUSES)
        found = [self._papers[slug] for slug in self._index.ranked(query)]
        return [
            paper
            for paper in found
            if family in (None, paper.family)
            and year in (None, paper.date.year)
            and (status is None or status == self.status(paper.slug))
        ]

    @cached_property
    def _index(self) -> Index:
        return Index(self._papers.values())

    def _check(self, evidence: Evidence) -> None:
        if evidence.paper not in self._papers:
            problem = f"evidence on a paper without a record, {evidence.paper!r}"
            raise CatalogError(f"{evidence.paper}.json: paper: {problem}; {nearest(evidence.paper, self._papers)}")
        known = [claim.id for claim in self._papers[evidence.paper].claims]
        for i, finding in enumerate(evidence.findings):
            if finding.claim not in known:
                problem = f"{finding.claim!r} is no claim of the paper"
                raise CatalogError(
                    f"{evidence.paper}.json: findings[{i}].claim: {problem}; {nearest(finding.claim, known)}"
                )


def _claim_status(claim: Claim, finding: Finding | None) -> ClaimStatus:
    if finding is not None:
        reason = finding.note if finding.verdict == "not testable here" else None
        return ClaimStatus(claim, finding.verdict, reason, finding)
    if claim.untestable is not None:
        return ClaimStatus(claim, "not testable here", claim.untestable, None)
    return ClaimStatus(claim, "not checked", None, None)


def _check_option(name: str, value: str | None, options: Sequence[str]) -> None:
    if value is not None and value not in options:
        raise CatalogError(f"unknown {name} {value[:80]!r}; {nearest(value, options)}")
