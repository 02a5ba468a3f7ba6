"""The integer programme that chooses one width for each layer, solved by HiGHS by way of SciPy."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def one_each(
    costs: Float[ndarray, "l c"], sizes: Float[ndarray, "l c"], least: float, most: float
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
    found = milp(
        costs.ravel(),
        integrality=np.ones(costs.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.kron(np.eye(layers), np.ones(choices)), 1, 1),
            LinearConstraint(sizes.reshape(1, -1), least, most),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    best: Int[ndarray, " l"] = found.x.reshape(layers, choices).argmax(1)
    return best
