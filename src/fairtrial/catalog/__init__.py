"""The papers: a record of each, search over them, and the recorded evidence on what they claim."""

from .catalogue import STATUSES, Catalogue, ClaimStatus, Status, UnknownPaper
from .evidence import EVIDENCE, VERDICTS, Evidence, Finding, Machine, Measurement, Verdict, as_table, write
from .fields import CatalogError
from .records import FAMILIES, Claim, Family, Paper

__all__ = [
    "EVIDENCE",
    "FAMILIES",
    "STATUSES",
    "VERDICTS",
    "CatalogError",
    "Catalogue",
    "Claim",
    "ClaimStatus",
    "Evidence",
    "Family",
    "Finding",
    "Machine",
    "Measurement",
    "Paper",
    "Status",
    "UnknownPaper",
    "Verdict",
    "as_table",
    "write",
]
