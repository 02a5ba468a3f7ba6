"""Every registered method is where its paper says, can be imported from its family, and can be tuned."""

import importlib
import inspect

import optuna
import pytest

from fairtrial.catalog import Catalogue
from fairtrial.contract import hyperparameters
from fairtrial.methods.registry import addresses, index
from fairtrial.trial.fingerprint import ROOT

from .kinds import KINDS

ENTRIES = index()
SLOTS = {
    *KINDS,
    "optimizer",
    "regression_loss",
    "schedule",
    "batch",
    "sampler",
    "layer",
    "cache",
    "decoder",
    "quantizer",
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_method_is_registered_under_its_papers_address(entry):
    paper = Catalogue.load()[entry.paper]
    of_others = f"fairtrial.methods.{paper.family}.packages"  # what a paper compares, from the packages that have it
    assert entry.module in (f"fairtrial.methods.{paper.family}.{paper.slug}", of_others)
    assert entry.slot in SLOTS
    family = importlib.import_module(f"fairtrial.methods.{paper.family}")
    assert getattr(family, entry.name) is entry.load().factory


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_what_is_searched_is_a_hyperparameter_and_within_its_range(entry):
    method = entry.load()
    assert set(method.search) <= set(hyperparameters(method))
    for name, space in method.search.items():
        trial = optuna.create_study().ask()
        assert space.contains(space.suggest(trial, name))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_index_read_from_the_source_agrees_with_what_was_registered(entry):
    method = entry.load()
    assert (method.paper, method.slot, method.name) == (entry.paper, entry.slot, entry.name)


def test_no_registration_escapes_the_index():
    announced = sum(path.read_text().count("\n@method(") for path in (ROOT / "methods").glob("*/*.py"))
    assert announced == len(ENTRIES)


def test_every_public_name_of_a_family_can_be_imported():
    for stub in (ROOT / "methods").glob("*/__init__.pyi"):
        family = importlib.import_module(f"fairtrial.methods.{stub.parent.name}")
        for name in family.__all__:
            assert inspect.isclass(getattr(family, name)) or callable(getattr(family, name))


def test_a_paper_without_a_slot_is_imported_from_its_own_file():
    found = addresses()
    assert found["adamp"] == ["fairtrial.methods.optimizers.AdamP", "fairtrial.methods.optimizers.SGDP"]
    assert "fairtrial.methods.optimizers.DeepGA" in found["deep_ga"]
    for address in found["deep_ga"]:
        module, _, name = address.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
