"""What fairtrial finds on a machine."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from fairtrial import __version__
from fairtrial.catalog import CatalogError, Catalogue
from fairtrial.trial.database import StoreError
from fairtrial.trial.schema import SCHEMA_VERSION
from fairtrial.trial.store import Store, default_store

NEEDED = ("torch", "numpy", "scipy", "scikit-learn", "optuna", "sqlalchemy")
EXTRAS = {
    "transformers": "llm",
    "peft": "adapters",
    "pytorch_optimizer": "optimizers",
    "psycopg": "postgres",
    "ray": "ray",
    "scikit-image": "vision",
    "gymnasium": "rl",
}


@dataclass(frozen=True)
class Item:
    """Something that was looked at."""

    what: str
    ok: bool
    found: str


def examine(store: str | None = None) -> list[Item]:
    """Look at everything a comparison needs; nothing but the store is made."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    items = [
        Item("fairtrial", True, __version__),
        Item("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Item("processors", True, f"{os.cpu_count()}, {memory:.0f} GiB of memory"),
    ]
    items += [_package(name) for name in NEEDED]
    items += [_extra(name, extra) for name, extra in EXTRAS.items()]
    return [*items, _accelerator(), _catalogue(), _store(store or default_store())]


def _package(name: str) -> Item:
    try:
        return Item(name, True, version(name))
    except PackageNotFoundError:
        return Item(name, False, "missing: pip install fairtrial")


def _extra(name: str, extra: str) -> Item:
    try:
        return Item(f"{name} (extra)", True, version(name))
    except PackageNotFoundError:
        return Item(f"{name} (extra)", True, f"not installed; pip install 'fairtrial[{extra}]' brings it")


def _accelerator() -> Item:
    import torch

    if torch.accelerator.is_available():
        return Item("accelerator", True, str(torch.accelerator.current_accelerator()))
    return Item("accelerator", True, "none; everything runs on the CPU")


def _catalogue() -> Item:
    try:
        return Item("catalogue", True, f"{len(Catalogue.load())} papers")
    except CatalogError as error:
        return Item("catalogue", False, str(error))


def _store(location: str) -> Item:
    try:
        with Store(location) as store:
            return Item("store", True, f"{store.location}, schema version {SCHEMA_VERSION}, {store.count()} runs")
    except StoreError as error:
        return Item("store", False, str(error))
