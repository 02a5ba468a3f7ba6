"""The integer programme that chooses one width for each layer, solved by HiGHS by way of SciPy."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

LARGEST = 1e3  # of costs and sizes as HiGHS has them, whose absolute tolerances are 1e-6
EXACT = 1e-9  # how far sums may be beyond the limits, relative to them
STEPS = tuple(1e-6 * 4**k for k in range(8))  # by which limits are narrowed when a choice is beyond them nevertheless


def one_each(
    costs: Float[ndarray, "l c"], sizes: Float[ndarray, "l c"], least: float | int, most: float | int
) -> Int[ndarray, " l"] | None:
    """The choice for each layer with the least sum of costs, whose sizes add up to within `least` and `most`.

    Args:
        costs: of each layer with each choice.
        sizes: what counts towards the limits.
        least, most: the limits; infinite ones do not limit.

    Returns:
        The places of the choices; None if no choice is within the limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, choices = costs.shape
    excess, room = (each - each.min(1, keepdims=True) for each in (costs, sizes))
    excess, scale = excess * LARGEST / (excess.max() or 1), LARGEST / (room.max() or 1)
    low, high = ((limit - sizes.min(1).sum()) * scale for limit in (least, most))
    for step in STEPS:
        found = milp(
            excess.ravel(),
            integrality=np.ones(costs.size, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(np.kron(np.eye(layers), np.ones(choices)), 1, 1),
                LinearConstraint(scale * room.reshape(1, -1), low, high),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        best: Int[ndarray, " l"] = found.x.reshape(layers, choices).argmax(1)
        total = sizes[np.arange(layers), best].sum()
        slack = EXACT * max(1, abs(total))
        if least - slack <= total <= most + slack:
            return best
        low, high = (low, high - step) if total > most else (low + step, high)
    return None
