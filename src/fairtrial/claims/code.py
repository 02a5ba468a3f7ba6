"""Which papers can be checked, and a fingerprint of the code that their evidence rests on. Imports no torch."""

from fairtrial.trial.fingerprint import ROOT, fingerprint

BOOKKEEPING = (
    "fairtrial.catalog",
    "fairtrial.claims.measure",
    "fairtrial.methods.registry",
    "fairtrial.trial.execute",
    "fairtrial.trial.store",
)


def family_of(slug: str) -> str | None:
    """The family whose claims folder has the paper's file."""
    return next((path.parent.name for path in (ROOT / "claims").glob(f"*/{slug}.py")), None)


def checkable(slug: str) -> bool:
    """Whether the paper's claims can be measured here."""
    return family_of(slug) is not None


def code_of(slug: str) -> str | None:
    """Fingerprint of the code that a paper's evidence rests on: its method, its claims file, and what those import.

    How runs are carried out and kept, and how methods and papers are listed, does not count: it changes no figure.
    """
    family = family_of(slug)
    if family is None:
        return None
    modules = (f"fairtrial.methods.{family}.{slug}", f"fairtrial.claims.{family}.{slug}")
    return fingerprint(modules, without=BOOKKEEPING)
