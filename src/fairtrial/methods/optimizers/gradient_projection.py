"""A gradient's leading subspace, and the way into it and back: what optimizers with low-rank moments share.

A basis is named by the side of the gradient G (m, n) that it is multiplied to: `left` is P (m, r), `right` is Q (r, n),
both with orthonormal vectors. The low-rank gradient is Pᵀ G, G Qᵀ or, with both, Pᵀ G Qᵀ.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fairtrial.methods.arguments import require

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

Bases = Mapping[str, Tensor]


def check_gradient_projection(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group whose `rank`, `update_proj_gap`, `scale` or `proj_type` has no meaning."""
    rank, gap, scale = group["rank"], group["update_proj_gap"], group["scale"]
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank < 1
    expected = "a whole number of at least 1, or a share of the shorter side within (0, 1)"
    require(rank is None or whole or share, "rank", rank, expected)
    require(isinstance(gap, int) and gap >= 1, "update_proj_gap", gap, "a whole number of at least 1")
    require(0 < scale < float("inf"), "scale", scale, "above 0 and finite")
    require(group["proj_type"] in PROJ_TYPES, "proj_type", group["proj_type"], f"one of {', '.join(PROJ_TYPES)}")


def rank_of(shape: tuple[int, ...], rank: int | float) -> int:
    """The rank for a matrix: at most its shorter side, and a share of that side if given as one, at least 1."""
    shorter = min(shape)
    return max(1, round(rank * shorter)) if isinstance(rank, float) else min(rank, shorter)


def sides_of(shape: tuple[int, ...], proj_type: str) -> tuple[str, ...]:
    """The sides that a matrix is projected on; 'std' compresses the shorter dimension, 'reverse_std' the longer."""
    tall = shape[0] >= shape[1]
    match proj_type:
        case "std":
            return ("right",) if tall else ("left",)
        case "reverse_std":
            return ("left",) if tall else ("right",)
        case "full":
            return ("left", "right")
    return (proj_type,)


def basis_shapes(shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The shapes of a matrix's bases by side."""
    r = rank_of(shape, group["rank"])
    return {side: (shape[0], r) if side == "left" else (r, shape[1]) for side in sides_of(shape, group["proj_type"])}


def low_rank_shape(shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[int, int]:
    """The shape of a matrix's low-rank gradient."""
    sides, r = sides_of(shape, group["proj_type"]), rank_of(shape, group["rank"])
    return (r if "left" in sides else shape[0], r if "right" in sides else shape[1])


def leading_subspace(grad: Float[Tensor, "m n"], group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The leading singular vectors on each side to project on, in float32 at least.

    With `fix_signs` the first of the entries of largest modulus of each vector is positive; without, the signs are
    those of the routine that computes them.
    """
    r = rank_of(grad.shape, group["rank"])
    U, _, Vh = torch.linalg.svd(grad.to(torch.promote_types(grad.dtype, torch.float32)), full_matrices=False)
    leading = {"left": U[:, :r], "right": Vh[:r]}
    bases = {side: leading[side] for side in sides_of(grad.shape, group["proj_type"])}
    if group["fix_signs"]:
        bases = {side: with_fixed_signs(basis, dim=0 if side == "left" else 1) for side, basis in bases.items()}
    # a view would keep all singular vectors alive
    return {side: basis.clone(memory_format=torch.contiguous_format) for side, basis in bases.items()}


def with_fixed_signs(basis: Float[Tensor, "a b"], dim: int) -> Float[Tensor, "a b"]:
    """Each vector along `dim` with the first of its entries of largest modulus made positive."""
    peak = basis.gather(dim, basis.abs().argmax(dim, keepdim=True))
    return torch.where(peak < 0, -basis, basis)


def project(grad: Float[Tensor, "m n"], bases: Bases) -> Float[Tensor, "a b"]:
    """The low-rank gradient: (r, n), (m, r) or (r, r)."""
    if "left" in bases:
        grad = bases["left"].T @ grad
    return grad @ bases["right"].T if "right" in bases else grad


def project_back(low_rank: Float[Tensor, "a b"], bases: Bases) -> Float[Tensor, "m n"]:
    """The matrix (m, n) that a low-rank one stands for."""
    if "left" in bases:
        low_rank = bases["left"] @ low_rank
    return low_rank @ bases["right"] if "right" in bases else low_rank


def descend_projected_(weight: Float[Tensor, "m n"], low_rank: Float[Tensor, "a b"], bases: Bases) -> None:
    """W ← W - P N, W - N Q or W - P N Q, without a further matrix of the weight's size."""
    if "right" not in bases:
        weight.addmm_(bases["left"], low_rank, alpha=-1)
    else:
        low_rank = bases["left"] @ low_rank if "left" in bases else low_rank
        weight.addmm_(low_rank, bases["right"], alpha=-1)
