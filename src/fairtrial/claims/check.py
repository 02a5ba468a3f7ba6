"""Measuring a paper's claims and recording the evidence."""

import importlib
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version

from fairtrial.catalog import CatalogError, Evidence, Finding, Machine, Paper
from fairtrial.claims.code import code_of
from fairtrial.claims.measure import Measure
from fairtrial.contract import BadInput


def check(paper: Paper, measure: Measure) -> Evidence:
    """Measure every testable claim of a paper anew.

    Raises:
        BadInput: nothing is there to measure the paper's claims with.
    """
    code = code_of(paper.slug)
    if code is None:
        raise BadInput(f"the claims of {paper.slug} cannot be measured yet: its methods are not here")
    started = time.perf_counter()
    module = importlib.import_module(f"fairtrial.claims.{paper.family}.{paper.slug}")
    findings: list[Finding] = module.check(measure)
    expected = [claim.id for claim in paper.claims if claim.testable]
    found = [finding.claim for finding in findings]
    if sorted(found) != sorted(expected):
        raise CatalogError(f"claims of {paper.slug}: measured {found}, but the record's testable claims are {expected}")
    return Evidence(
        paper=paper.slug,
        date=datetime.now(UTC).date(),
        fingerprint=code,
        seconds=round(time.perf_counter() - started, 1),
        machine=machine(),
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("fairtrial", "torch", "numpy", "scikit-learn")},
        },
        findings=tuple(sorted(findings, key=lambda finding: expected.index(finding.claim))),
    )


def machine() -> Machine:
    """The class of machine that figures were measured on."""
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        memory = 0
    return Machine(f"{platform.system()} {platform.machine()}", os.cpu_count() or 0, memory)
