"""Every run of a comparison, recipe by recipe: tuning runs first, then evaluation runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fairtrial.contract import Outcome, Split

if TYPE_CHECKING:
    from fairtrial.trial.comparison import Comparison, Judged
    from fairtrial.trial.recipe import Recipe
    from fairtrial.trial.tuning import Tuned


@dataclass(frozen=True)
class Carried:
    """A run that was carried out.

    Attributes:
        place: the recipe's place in the comparison; 0 is the baseline.
        number: 1, 2, … within its tuning; 1 for an evaluation run.
        seed: of the run itself.
        serves: the evaluation seed that it is, or was tuned for; None if it was tuned for all of them.
        recipe: with the hyperparameters that the run had.
    """

    place: int
    judged: "Judged"
    phase: Literal["tuning", "evaluation"]
    number: int
    seed: int
    serves: int | None
    recipe: "Recipe"
    outcome: Outcome

    @property
    def split(self) -> Split:
        return "validation" if self.phase == "tuning" else "test"

    @property
    def label(self) -> str:
        """'tuning run 3 for seed 0', or 'seed 0'."""
        if self.phase == "evaluation":
            return f"seed {self.seed}"
        return f"tuning run {self.number}" + ("" if self.serves is None else f" for seed {self.serves}")


def tuned_once(comparison: "Comparison") -> bool:
    """Whether one tuning served all evaluation seeds."""
    return len(comparison.tuning_seeds) < len(comparison.evaluation_seeds)


def tunings_of(comparison: "Comparison", judged: "Judged") -> list["Tuned"]:
    """The tunings of a recipe: one for each evaluation seed, or the one for all."""
    tunings = list(judged.tunings) or [judged.tuned]
    return tunings[:1] if tuned_once(comparison) else tunings


def runs_of(comparison: "Comparison") -> Iterator[Carried]:
    for place, judged in enumerate(comparison.recipes):
        once, tunings = tuned_once(comparison), tunings_of(comparison, judged)
        for turn, (tuned, seed) in enumerate(zip(tunings, comparison.tuning_seeds, strict=False)):
            serves = None if once else comparison.evaluation_seeds[turn]
            for number, (params, outcome) in enumerate(tuned.history, start=1):
                recipe = judged.recipe
                for key, value in params.items():
                    slot, _, name = key.partition(".")
                    recipe = recipe.with_params({slot: {name: value}})
                yield Carried(place, judged, "tuning", number, seed, serves, recipe, outcome)
        # a recipe that is decided early has fewer outcomes than there are seeds
        for turn, (seed, outcome) in enumerate(zip(comparison.evaluation_seeds, judged.outcomes, strict=False)):
            recipe = judged.recipe.with_params(tunings[min(turn, len(tunings) - 1)].params)
            yield Carried(place, judged, "evaluation", 1, seed, seed, recipe, outcome)
