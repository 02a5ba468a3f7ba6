"""Every run of a comparison, one after the other: tuning runs first, then evaluation runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fairtrial.contract import Outcome, Split
from fairtrial.trial.comparison import Comparison, Judged
from fairtrial.trial.recipe import Recipe


@dataclass(frozen=True)
class Carried:
    """A run that was carried out.

    Attributes:
        place: the recipe's place in the comparison; 0 is the baseline.
        number: 1, 2, … within its recipe and phase.
        recipe: with the hyperparameters that the run had.
    """

    place: int
    judged: Judged
    phase: Literal["tuning", "evaluation"]
    number: int
    seed: int
    recipe: Recipe
    outcome: Outcome

    @property
    def split(self) -> Split:
        return "validation" if self.phase == "tuning" else "test"

    @property
    def label(self) -> str:
        """'tuning run 3' or 'seed 0'."""
        return f"tuning run {self.number}" if self.phase == "tuning" else f"seed {self.seed}"


def runs_of(comparison: Comparison) -> Iterator[Carried]:
    for place, judged in enumerate(comparison.recipes):
        seed = comparison.tuning_seeds[0] if comparison.tuning_seeds else 0
        for number, (params, outcome) in enumerate(judged.tuned.history, start=1):
            recipe = judged.recipe.with_params({})
            for key, value in params.items():
                slot, _, name = key.partition(".")
                recipe = recipe.with_params({slot: {name: value}})
            yield Carried(place, judged, "tuning", number, seed, recipe, outcome)
        best = judged.recipe.with_params(judged.tuned.params)
        pairs = zip(comparison.evaluation_seeds, judged.outcomes, strict=False)  # a decided recipe may stop earlier
        for number, (seed, outcome) in enumerate(pairs, start=1):
            yield Carried(place, judged, "evaluation", number, seed, best, outcome)
