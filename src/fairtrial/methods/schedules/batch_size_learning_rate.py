"""The largest learning rate for each batch size, by random-matrix theory (Granziol et al. 2020, arXiv:2006.09092).

The Hessian of a batch of B out of N samples is that of all, plus symmetric noise whose entries have variance σ²/b with
the effective batch b = B / (1 - B/N). Noise alone has its P eigenvalues within ± 2 √(P/b) σ, and an eigenvalue λ of the
full Hessian is found in the batch's at

    λ' = λ + (P/b) σ² / λ    if |λ| > √(P/b) σ,    else at the edge of the noise.

Gradient descent is stable up to the rate 2/λ'₁. With λ₁ outside the noise that is 2 λ₁ b / (λ₁² b + P σ²), which grows
with the batch and saturates at 2/λ₁ above the knee b* = P σ²/λ₁²; below the knee the noise sets √b / (σ √P). Adaptive
methods with little damping divide by the curvature that they can tell from noise, and are left with the edge: √b again.
The rule of thumb is a rate ∝ B for SGD up to the knee and ∝ √B for Adam (`scale_lr`).

The formulas for the additive noise are those of spiked Wigner matrices. The paper has a similar result for the
generalised Gauss-Newton matrix, whose noise is multiplicative; its exact statement could not be confirmed, and here it
is that of spiked covariances. Nor could the constants for adaptive methods be, or how its learner picks eigenvalues:
`heavy_ball` says what was chosen. The paper takes the formula for outliers, linear in b far below the knee, as the
reason of linear scaling; where that holds, λ₁ is no outlier any more, and here the rate is that of the edge.

Matrices are given by their products with vectors, NumPy arrays in and out; `hessian_products` makes those of a model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.schedules.ghost_batch_norm import linear_lr, sqrt_lr

Array = NDArray[np.float64]
Numbers = ArrayLike | Sequence[float | int] | float | int
Products = Callable[[Array], Array]  # v to A v


def effective_batch(B: Numbers, N: int | None = None) -> Float[np.ndarray, "..."]:
    """b = B / (1 - B/N): what B samples drawn without replacement are worth; infinite for all of them.

    Args:
        B: samples in the batch, within 1..N.
        N: samples in the data set; by default without end.
    """
    sizes = np.asarray(B, dtype=np.float64)
    limit = math.inf if N is None else N
    require(bool(np.all((sizes >= 1) & (sizes <= limit))), "B", B, f"within 1..{limit}")
    with np.errstate(divide="ignore"):
        return np.asarray(sizes / (1 - sizes / limit))


class BatchHessianEdges(NamedTuple):
    """Where eigenvalues of the full Hessian are found in that of a batch.

    Attributes:
        edge: the extreme eigenvalue λ', on the side that λ is on.
        is_outlier: whether λ stands out of the noise.
        overlap: squared cosine between the eigenvectors of λ and λ'; 0 if it does not stand out.
    """

    edge: Float[np.ndarray, "..."]
    is_outlier: NDArray[np.bool_]
    overlap: Float[np.ndarray, "..."]


def batch_hessian_edges(
    lam: Numbers,
    sigma: Numbers,
    P: int,
    B: Numbers,
    N: int | None = None,
    noise: Literal["additive", "multiplicative"] = "additive",
) -> BatchHessianEdges:
    """The eigenvalue of a batch Hessian that belongs to each eigenvalue `lam` of the full one; arrays broadcast.

    Args:
        lam: few of the P eigenvalues of the full matrix. For 'additive' those below 0 are mirror images of those above.
        sigma: for 'additive' σ, the noise of a matrix entry at batch size 1, above 0; for 'multiplicative' the root of
            all other eigenvalues of the population.
        P: number of parameters.
        B: samples in the batch, within 1..N.
        N: samples in the data set; by default without end.
        noise: 'additive' for the Hessian; 'multiplicative' for (1/b) Σ g gᵀ of b vectors, a Gauss-Newton matrix: with
            q = P/b, λ' = λ (1 + q σ² / (λ - σ²)) if λ > σ² (1 + √q), else at σ² (1 + √q)².
    """
    lam, sigma = np.asarray(lam, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    _check_noise(sigma, P)
    require(bool(np.isfinite(lam).all()), "lam", lam, "finite")
    require(noise in ("additive", "multiplicative"), "noise", noise, "'additive' or 'multiplicative'")
    q = P / effective_batch(B, N)
    if noise == "additive":
        threshold = np.sqrt(q) * sigma
        is_outlier = np.abs(lam) > threshold
        ratio = threshold / np.where(is_outlier, lam, 1.0)
        edge = np.where(is_outlier, lam + threshold * ratio, np.where(lam < 0, -2.0, 2.0) * threshold)
        overlap = np.where(is_outlier, 1 - ratio**2, 0.0)
    else:
        require(bool((lam >= 0).all()), "lam", lam, "at least 0 for multiplicative noise")
        is_outlier = lam > sigma**2 * (1 + np.sqrt(q))
        above = np.where(is_outlier, lam / sigma**2, 2.0) - 1
        edge = np.where(is_outlier, lam * (1 + q / above), sigma**2 * (1 + np.sqrt(q)) ** 2)
        overlap = np.where(is_outlier, (1 - q / above**2) / (1 + q / above), 0.0)
    return BatchHessianEdges(*np.broadcast_arrays(edge, is_outlier, overlap))


def max_sgd_lr(B: Numbers, lam1: float, sigma: float, P: int, N: int | None = None) -> Float[np.ndarray, "..."]:
    """The largest stable rate of SGD, 2/λ'₁, for each batch size; arguments as in `batch_hessian_edges`, lam1 > 0."""
    require(0 < lam1 < math.inf, "lam1", lam1, "above 0 and finite")
    return np.asarray(2 / batch_hessian_edges(lam1, sigma, P, B, N).edge)


def max_adaptive_lr(
    B: Numbers, sigma: float, P: int, N: int | None = None, *, damping: float, learned: float = 0.0
) -> Float[np.ndarray, "..."]:
    """The largest stable rate of an adaptive method: (damping + learned) √b / (σ √P), infinite without noise.

    Args:
        B, sigma, P, N: as in `batch_hessian_edges`.
        damping: δ, what is added to the preconditioner: Adam's eps.
        learned: the preconditioner's own value in directions that noise hides; none by default.
    """
    _check_noise(np.asarray(sigma), P)
    require(0 < damping < math.inf, "damping", damping, "above 0 and finite")
    require(0 <= learned < math.inf, "learned", learned, "at least 0 and finite")
    return np.asarray((damping + learned) * np.sqrt(effective_batch(B, N) / P) / sigma)


def knee_batch(lam1: float, sigma: float, P: int) -> float:
    """b* = P σ²/λ₁², the effective batch from which on λ₁ stands out of the noise; the rate there is 1/λ₁."""
    _check_noise(np.asarray(sigma), P)
    require(0 < lam1 < math.inf, "lam1", lam1, "above 0 and finite")
    return P * (sigma / lam1) ** 2


def _check_noise(sigma: Array, P: int) -> None:
    require(bool(np.all((sigma > 0) & (sigma < math.inf))), "sigma", sigma, "above 0 and finite")
    require(P >= 1, "P", P, "at least 1")


def scale_lr(
    base_lr: float,
    base_batch: int,
    batch: int,
    rule: Literal["linear", "sqrt"] = "linear",
    knee: int | None = None,
) -> float:
    """The rate for a batch from that tuned for another: ∝ B ('linear', for SGD) or ∝ √B ('sqrt', for Adam).

    Args:
        base_lr: the rate tuned for `base_batch`.
        base_batch: samples.
        batch: samples.
        rule: 'linear' or 'sqrt'.
        knee: the batch from which on the rate stays, at least 1; none by default.
    """
    require(rule in ("linear", "sqrt"), "rule", rule, "'linear' or 'sqrt'")
    if knee is not None:
        require(knee >= 1, "knee", knee, "at least 1")
        base_batch, batch = min(base_batch, knee), min(batch, knee)
    return (linear_lr if rule == "linear" else sqrt_lr)(base_lr, batch, base_batch)


def hessian_products(loss: Float[Tensor, ""], params: Sequence[nn.Parameter]) -> Products:
    """Products with the Hessian of a loss, computed with a graph, in parameters; vectors hold them one after another.

    The graph is kept for as long as the function is. Use float64 parameters where 6 digits are not enough.

        products = hessian_products(loss_fn(model(x), y), list(model.parameters()))
    """
    grads = torch.autograd.grad(loss, params, create_graph=True)
    gradient = torch.cat([grad.flatten() for grad in grads])

    def products(v: Array) -> Array:
        vector = torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(gradient)
        rows = torch.autograd.grad(gradient, params, vector, retain_graph=True)
        return torch.cat([row.flatten() for row in rows]).double().cpu().numpy()

    return products


def estimate_noise_sigma(
    batch_products: Sequence[Products],
    products: Products,
    dim: int,
    B: int,
    N: int | None = None,
    *,
    probes: int = 10,
    seed: int = 0,
) -> float:
    """σ from E ‖(H_batch - H) v‖² = P σ²/b over random unit vectors v.

    Args:
        batch_products: products with the Hessian of each of some batches of B samples.
        products: those with the full Hessian.
        dim: number of parameters P.
        B, N: as in `batch_hessian_edges`; B below N.
        probes: random vectors for each batch.
        seed: of the vectors.
    """
    require(len(batch_products) > 0, "batch_products", batch_products, "at least one")
    require(probes >= 1, "probes", probes, "at least 1")
    b = float(effective_batch(B, N))
    require(b < math.inf, "B", B, "below N: the whole data set has no noise")
    vectors = _unit_vectors(probes, dim, seed)
    apart = [np.square(own(v) - whole).sum() for v in vectors for whole in [products(v)] for own in batch_products]
    return math.sqrt(b * float(np.mean(apart)) / dim)


def lanczos_extremes(products: Products, dim: int, steps: int = 30, seed: int = 0) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of a symmetric matrix, by restarted Lanczos.

    First the one of larger magnitude μ, then that of A - μ, so that both are found to 1e-6 of the spectrum's width: an
    end near 0, as that of a positive semidefinite matrix, could not be found to a fraction of itself.

    Args:
        products: those with the matrix.
        dim: its size, at least 3.
        steps: vectors held at a time, at least 5.
        seed: of the start.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: eigenvalues too close to be told apart in 10 · dim restarts.
    """
    require(dim >= 3, "dim", dim, "at least 3")
    require(steps >= 5, "steps", steps, "at least 5")
    start = _unit_vectors(1, dim, seed)[0]

    def farthest(shift: float) -> float:
        operator = LinearOperator((dim, dim), matvec=lambda v: products(v) - shift * v, dtype=np.float64)
        found = eigsh(operator, 1, v0=start, ncv=min(steps, dim), tol=1e-6, return_eigenvectors=False)
        return shift + float(found[0])

    end = farthest(0.0)
    other = farthest(end)
    return min(end, other), max(end, other)


class SpectralMeasure(NamedTuple):
    """Eigenvalues as stochastic Lanczos quadrature sees them: weights at a few points, which add up to 1."""

    values: Float[np.ndarray, " points"]
    weights: Float[np.ndarray, " points"]

    def density(self, grid: Numbers, width: float) -> Float[np.ndarray, "..."]:
        """The density on a grid, every point being widened to a normal distribution with that standard deviation."""
        require(0 < width < math.inf, "width", width, "above 0 and finite")
        apart = (np.asarray(grid, dtype=np.float64)[..., None] - self.values) / width
        bells: Array = np.exp(-0.5 * apart**2) @ self.weights / (width * math.sqrt(2 * math.pi))
        return bells


def slq_density(products: Products, dim: int, steps: int = 30, probes: int = 10, seed: int = 0) -> SpectralMeasure:
    """The density of eigenvalues of a symmetric matrix, from `steps` Lanczos steps from each of some random vectors.

    Args:
        products: those with the matrix.
        dim: its size.
        steps: Lanczos steps, at least 1; at most `dim` are made.
        probes: random vectors, at least 1.
        seed: of the vectors.
    """
    require(steps >= 1, "steps", steps, "at least 1")
    require(probes >= 1, "probes", probes, "at least 1")
    quadratures = [_quadrature(products, start, min(steps, dim)) for start in _unit_vectors(probes, dim, seed)]
    values, weights = zip(*quadratures, strict=True)
    return SpectralMeasure(np.concatenate(values), np.concatenate(weights) / probes)


def _quadrature(products: Products, start: Array, steps: int) -> tuple[Array, Array]:
    """Ritz values and the squared first entries of their vectors, by Lanczos with full reorthogonalisation."""
    basis = np.empty((steps, start.size))
    basis[0] = start
    diagonal, off = np.empty(steps), np.empty(steps)
    for step in range(steps):
        w = products(basis[step])
        diagonal[step] = w @ basis[step]
        held = basis[: step + 1]
        for _ in range(2):  # once leaves more than round-off behind
            w = w - held.T @ (held @ w)
        off[step] = np.linalg.norm(w)
        if step + 1 == steps or off[step] <= 1e-10 * np.abs(diagonal[: step + 1]).max():
            break  # nothing is left: the vectors span what the start can reach
        basis[step + 1] = w / off[step]
    values, vectors = eigh_tridiagonal(diagonal[: step + 1], off[:step])
    return np.asarray(values, dtype=np.float64), vectors[0] ** 2


def _unit_vectors(count: int, dim: int, seed: int) -> Array:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    normed: Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normed


class HeavyBall(NamedTuple):
    """Rate and momentum of gradient descent."""

    lr: float
    momentum: float


def heavy_ball(
    ritz: Numbers,
    sigma: float,
    P: int,
    B: int,
    N: int | None = None,
    select: Literal["noise_edge", "positive"] = "noise_edge",
) -> HeavyBall:
    """Rate and momentum from the spectrum of a batch Hessian: 4/(√λ₁ + √λ_n)² and ((√λ₁ - √λ_n)/(√λ₁ + √λ_n))².

    Rate and momentum follow the heavy-ball optimum for the estimated spectrum edges; the published selection rule could
    not be confirmed.

    Args:
        ritz: estimated eigenvalues, of which the largest is λ₁: `slq_density(…).values`.
        sigma, P, B, N: the noise, as in `batch_hessian_edges`.
        select: λ_n is the smallest of them above the noise's edge, or the edge if there is none ('noise_edge'), or the
            smallest above 0 ('positive').
    """
    values = np.asarray(ritz, dtype=np.float64)
    require(values.size > 0 and float(values.max()) > 0, "ritz", ritz, "values of which at least one is above 0")
    require(select in ("noise_edge", "positive"), "select", select, "'noise_edge' or 'positive'")
    edge = float(batch_hessian_edges(0.0, sigma, P, B, N).edge) if select == "noise_edge" else 0.0
    largest, clear = float(values.max()), values[values > edge]
    smallest = float(clear.min()) if clear.size else edge
    roots = math.sqrt(largest), math.sqrt(smallest)
    return HeavyBall(4 / sum(roots) ** 2, ((roots[0] - roots[1]) / sum(roots)) ** 2)


def spiked_wigner(
    P: int, spikes: Sequence[float], sigma: float, b: float | int, rng: np.random.Generator
) -> Float[np.ndarray, "P P"]:
    """A matrix with the given eigenvalues, all others 0, plus symmetric noise: what the additive model is about.

    Args:
        P: size.
        spikes: at most P eigenvalues; their eigenvectors are the first axes, which loses nothing, for the noise looks
            the same from everywhere.
        sigma: entries off the diagonal have variance sigma²/b, those on it twice as much.
        b: effective batch, above 0.
        rng: what the noise is drawn from.
    """
    require(len(spikes) <= P, "spikes", len(spikes), f"at most {P} eigenvalues")
    require(b > 0, "b", b, "above 0")
    _check_noise(np.asarray(sigma), P)
    noise = rng.standard_normal((P, P))
    matrix: Array = (noise + noise.T) * (sigma / math.sqrt(2 * b))
    matrix[np.diag_indices(len(spikes))] += np.asarray(spikes, dtype=np.float64)
    return matrix
