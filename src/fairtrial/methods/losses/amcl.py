"""AMCL: several projection heads, and for every pair a temperature of its own (Wang et al. 2023, arXiv:2310.05615).

Heads c = 1..C project a sample's features to z^c in d' dimensions. With sim the cosine, for anchor i with the positive
i⁺, its other view, and n* the negative of highest similarity, of all other samples in both views (equation 2.1):

    L_i = sum_c { -sim(z^c_i, z^c_i⁺) / τ⁺ + sim(z^c_i, z^c_n*) / τ⁻ + β Ω(τ⁺) - β Ω(τ⁻) },
    Ω(τ) = (d'/2) log τ + 1/τ

A pair's temperature comes from its two projections, τ = low + (high - low) sigmoid(φ(z_i, z_j)). It is the variance of
a Gaussian: for unit vectors -log N(z⁺; z, τ I) = Ω(τ) - sim/τ + (d'/2) log 2π, so at β = 1 the positive part is that
likelihood, and Ω keeps temperatures from running away. The positive's is stationary at 2 (β - sim) / (β d'). The
negative part is maximised where the positive one is minimised, so that its temperature runs to a bound, and `low` must
not be tiny. Instead of the hardest negative, the mean over the hardest few may be taken.

`SimSiamAMCLLoss` (equation 2.2) and `BarlowAMCLLoss` (equation 2.3) are the same for two further frameworks.

The equations are those of the tables in the authors' repository, https://github.com/LeiWangR/cl, whose code cannot be
run as it stands: its training step uses another loss than (2.1), and takes d' from the wrong tensor. φ has two forms:
`mode='dot'` follows descriptions of the paper, one MLP applied to both projections and the dot product of the results;
`mode='concat'` is the released code, an MLP on both at once. The bounds are ours (the code's are 1e-5 and 2.0, with
which temperatures diverge), and so is it that φ sees the projections at length 1. β = 0.1 and three heads are the
code's; κ, the number of negatives, is tuned in the paper and 1 here.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, reduce
from fairtrial.methods.losses.contrastive import check_finite, check_temperature, check_views, full_precision, unit
from fairtrial.methods.registry import Integer, LogUniform, method


def omega(temperature: Float[Tensor, "*n"], dim: int) -> Float[Tensor, "*n"]:
    """The regulariser Ω(τ) = (d'/2) log τ + 1/τ, lowest at τ = 2/d'."""
    return 0.5 * dim * temperature.log() + 1.0 / temperature


class MultiHeadProjector(nn.Module):
    """Projection heads in_dim-hidden_dim-out_dim of one architecture, each with weights of its own.

    Weights are used in the input's dtype, which is half precision in float32: see `AMCLLoss`.

    Args:
        in_dim, hidden_dim, out_dim: sizes of the layers, between which there is a ReLU.
        num_heads: C ≥ 1.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_heads: int = 3) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "hidden_dim": hidden_dim, "out_dim": out_dim, "num_heads": num_heads}
        for name, size in sizes.items():
            require(size >= 1, name, size, "at least 1")
        self.sizes = sizes
        self.hidden_weight = nn.Parameter(torch.empty(num_heads, in_dim, hidden_dim))
        self.hidden_bias = nn.Parameter(torch.empty(num_heads, 1, hidden_dim))
        self.out_weight = nn.Parameter(torch.empty(num_heads, hidden_dim, out_dim))
        self.out_bias = nn.Parameter(torch.empty(num_heads, 1, out_dim))
        for parameter, inputs in (
            (self.hidden_weight, in_dim),
            (self.hidden_bias, in_dim),
            (self.out_weight, hidden_dim),
            (self.out_bias, hidden_dim),
        ):
            nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)  # as nn.Linear's

    def forward(self, x: Float[Tensor, "*c n i"]) -> Float[Tensor, "h n o"]:
        """Features (n, in_dim), the same for all heads, or (heads, n, in_dim), each head's own."""
        hidden = torch.relu(x @ self.hidden_weight.to(x.dtype) + self.hidden_bias.to(x.dtype))
        return hidden @ self.out_weight.to(x.dtype) + self.out_bias.to(x.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


class PairTemperature(nn.Module):
    """Temperatures of pairs, between `low` and `high`, predicted from the two projections of each.

    Args:
        dim: d', the length of a projection.
        hidden: width of the MLP's hidden layer, as in the released code.
        low, high: bounds, 0 < low < high.
        mode: 'dot', one MLP on each projection and the dot product of the results, the same for both orders of a pair;
            'concat', one MLP on both projections, which needs pairs × hidden numbers of memory.
        num_heads: heads with an MLP of their own; by default one MLP serves all.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        low: float = 0.05,
        high: float = 1.0,
        *,
        mode: str = "dot",
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        check_temperature(low, "low")
        require(low < high < math.inf, "high", high, f"above low, which is {low!r}, and finite")
        require(mode in ("dot", "concat"), "mode", mode, "'dot' or 'concat'")
        self.low, self.high, self.mode = low, high, mode
        self.mlp = MultiHeadProjector(*((dim, hidden, dim) if mode == "dot" else (2 * dim, hidden, 1)), num_heads)

    def forward(self, a: Float[Tensor, "c n d"], b: Float[Tensor, "c n d"]) -> Float[Tensor, "c n"]:
        """Temperatures of row i of one with row i of the other, by head."""
        if self.mode == "dot":
            return self._bounded((self.mlp(a) * self.mlp(b)).sum(-1))
        return self._bounded(self.mlp(torch.cat([a, b], -1))[..., 0])

    def all_pairs(self, a: Float[Tensor, "c n d"], b: Float[Tensor, "c m d"]) -> Float[Tensor, "c n m"]:
        """Temperatures of all rows of one with all rows of the other, by head."""
        if self.mode == "dot":
            return self._bounded(self.mlp(a) @ self.mlp(b).mT)
        weight, mlp = self.mlp.hidden_weight.to(a.dtype), self.mlp
        of_a, of_b = (x @ part for x, part in zip((a, b), weight.split(a.shape[-1], 1), strict=True))
        bias = mlp.hidden_bias.to(a.dtype)
        hidden = torch.relu(of_a[:, :, None] + of_b[:, None] + bias[:, None])
        phi = hidden @ mlp.out_weight.to(a.dtype)[:, None] + mlp.out_bias.to(a.dtype)[:, None]
        return self._bounded(phi[..., 0])

    def _bounded(self, phi: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.low + (self.high - self.low) * torch.sigmoid(phi)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}, mode={self.mode!r}"


class FixedTemperature(nn.Module):
    """The same temperature for all pairs, in the place of `PairTemperature`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, a: Float[Tensor, "c n d"], b: Float[Tensor, "c n d"]) -> Float[Tensor, "c n"]:
        return a.new_full(a.shape[:-1], self.temperature)

    def all_pairs(self, a: Float[Tensor, "c n d"], b: Float[Tensor, "c m d"]) -> Float[Tensor, "c n m"]:
        return a.new_full((*a.shape[:-1], b.shape[-2]), self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


Temperatures = PairTemperature | FixedTemperature


def adaptive_terms(
    positive: Float[Tensor, "c n"],
    positive_temperature: Float[Tensor, "c n"],
    negative: Float[Tensor, "c n m"],
    negative_temperature: Float[Tensor, "c n m"],
    *,
    dim: int,
    beta: float = 0.1,
    top_k: int = 1,
    negative_form: str = "max",
) -> Float[Tensor, " n"]:
    """Equation 2.1 from similarities and temperatures, by head: the loss of each anchor, summed over heads.

    With the positive among the negatives it is equation 2.4, of the frameworks LGP and CAN.
    """
    hardest, place = negative.topk(top_k, dim=-1)  # which they are has no gradient
    their_temperature = negative_temperature.gather(-1, place)
    scaled = positive / positive_temperature
    if negative_form == "max":
        pushed = (hardest / their_temperature).mean(-1)
    else:
        pushed = torch.cat([scaled[..., None], negative / negative_temperature], -1).logsumexp(-1)
    regulariser = omega(positive_temperature, dim) - omega(their_temperature, dim).mean(-1)
    return (pushed - scaled + beta * regulariser).sum(0)


def check_heads(a: Float[Tensor, "..."], b: Float[Tensor, "..."], names: tuple[str, str], fewest: int) -> None:
    require(a.ndim == 3 and a.numel() > 0, names[0], tuple(a.shape), "projections of shape (heads, n, d)")
    require(a.shape[1] >= fewest, names[0], tuple(a.shape), f"projections of at least {fewest} samples")
    require(b.shape == a.shape, names[1], tuple(b.shape), f"of shape {tuple(a.shape)}, as {names[0]}")
    check_finite(a, names[0])
    check_finite(b, names[1])


def as_tensor(heads: Float[Tensor, "c n d"] | Sequence[Float[Tensor, "n d"]]) -> Float[Tensor, "c n d"]:
    """Heads one by one are put into one tensor."""
    return heads if isinstance(heads, Tensor) else torch.stack(list(heads))


def check_beta(beta: float) -> None:
    require(0 <= beta < math.inf, "beta", beta, "at least 0 and finite")


class AMCLLoss(nn.Module):
    """AMCL in the form of SimCLR (equation 2.1), of the projections (heads, n, d') of two views of n ≥ 2 samples.

    Both views are anchors. Half precision is computed with in float32. The weights of `temperature` are to be trained
    along with the model.

    Args:
        temperature: a `PairTemperature`, or a number for all pairs.
        beta: β ≥ 0, weight of Ω.
        top_k: κ ≥ 1, how many of the 2 (n - 1) negatives count, the most similar ones; all of them if there are fewer.
        negative: 'max', the mean over the κ; or 'logsumexp', NT-Xent with temperatures of pairs, which is no form of
            the paper. The κ count then in Ω only.
        reduction: 'none' gives the mean over a sample's two views, (n,); 'mean' or 'sum'.
    """

    def __init__(
        self,
        temperature: PairTemperature | float,
        beta: float = 0.1,
        *,
        top_k: int = 1,
        negative: str = "max",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_beta(beta)
        require(top_k >= 1, "top_k", top_k, "at least 1")
        require(negative in ("max", "logsumexp"), "negative", negative, "'max' or 'logsumexp'")
        check_reduction(reduction)
        self.temperature = temperature if isinstance(temperature, nn.Module) else FixedTemperature(temperature)
        self.beta, self.top_k, self.negative, self.reduction = beta, top_k, negative, reduction

    def forward(
        self,
        views1: Float[Tensor, "c n d"] | Sequence[Float[Tensor, "n d"]],
        views2: Float[Tensor, "c n d"] | Sequence[Float[Tensor, "n d"]],
    ) -> Float[Tensor, "..."]:
        first, second = as_tensor(views1), as_tensor(views2)
        check_heads(first, second, ("views1", "views2"), 2)
        n = first.shape[1]
        with full_precision(first):
            z = unit(torch.cat([first, second], 1))
            similarity, temperature = z @ z.mT, self.temperature.all_pairs(z, z)
            positive, tau = (
                torch.cat([x.diagonal(n, 1, 2), x.diagonal(-n, 1, 2)], 1) for x in (similarity, temperature)
            )
            negatives = _others(n, z.device)
            loss = adaptive_terms(
                positive,
                tau,
                *(x.gather(2, negatives.expand(len(z), -1, -1)) for x in (similarity, temperature)),
                dim=z.shape[-1],
                beta=self.beta,
                top_k=min(self.top_k, negatives.shape[1]),
                negative_form=self.negative,
            )
        return reduce(loss.view(2, n).mean(0), self.reduction).to(first.dtype)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, top_k={self.top_k}, negative={self.negative!r}, reduction={self.reduction!r}"


def _others(n: int, device: torch.device) -> Tensor:
    """For each of 2n rows, views one after the other, the 2n - 2 rows of other samples."""
    steps = torch.cat([torch.arange(1, n, device=device), torch.arange(n + 1, 2 * n, device=device)])
    return (torch.arange(2 * n, device=device)[:, None] + steps) % (2 * n)


@method(
    paper="amcl",
    slot="contrastive_loss",
    search={"beta": LogUniform(0.01, 1.0), "top_k": Integer(1, 16, log=True)},
    bind=lambda setting: {"embedding_dim": setting.embedding_dim},
)
class AMCL(nn.Module):
    """AMCL of two views (n, embedding_dim) of n ≥ 2 samples, row i with row i, with heads and temperatures of its own.

    For a model with a single output: the heads come after it. Their weights are this module's parameters, to be
    trained along with the model's.

    Args:
        embedding_dim: length of an embedding.
        num_heads: C ≥ 1.
        beta: β ≥ 0, weight of Ω.
        hidden_dim, out_dim: sizes of the heads' layers; the paper's are 512 and 128 after 512 features.
        top_k: κ ≥ 1, how many of the negatives count, the most similar ones.
        low, high, mode: of `PairTemperature`, which serves all heads.
        reduction: 'none' gives the mean over a sample's two views, (n,); 'mean' or 'sum'.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 3,
        beta: float = 0.1,
        *,
        hidden_dim: int = 128,
        out_dim: int = 32,
        top_k: int = 1,
        low: float = 0.05,
        high: float = 1.0,
        mode: str = "dot",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(embedding_dim >= 1, "embedding_dim", embedding_dim, "at least 1")
        self.projector = MultiHeadProjector(embedding_dim, hidden_dim, out_dim, num_heads)
        temperature = PairTemperature(out_dim, low=low, high=high, mode=mode)
        self.loss = AMCLLoss(temperature, beta, top_k=top_k, reduction=reduction)

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, "..."]:
        check_views(z1, z2, ("z1", "z2"))
        with full_precision(z1):
            heads = [self.projector(at_least_float32(z)) for z in (z1, z2)]
        loss: Tensor = self.loss(*heads)
        return loss.to(z1.dtype)

    def extra_repr(self) -> str:
        sizes = self.projector.sizes
        return f"embedding_dim={sizes['in_dim']}, num_heads={sizes['num_heads']}"


class SimSiamAMCLLoss(nn.Module):
    """AMCL in the form of SimSiam (equation 2.2): without negatives.

    Args:
        temperature: a `PairTemperature`, or a number for all pairs.
        beta: β ≥ 0, weight of Ω.
        reduction: 'none' gives the loss of each sample; 'mean' or 'sum'.
    """

    def __init__(self, temperature: PairTemperature | float, beta: float = 0.1, *, reduction: str = "mean") -> None:
        super().__init__()
        check_beta(beta)
        check_reduction(reduction)
        self.temperature = temperature if isinstance(temperature, nn.Module) else FixedTemperature(temperature)
        self.beta, self.reduction = beta, reduction

    def forward(
        self,
        predictions1: Float[Tensor, "c n d"],
        predictions2: Float[Tensor, "c n d"],
        targets1: Float[Tensor, "n d"],
        targets2: Float[Tensor, "n d"],
    ) -> Float[Tensor, "..."]:
        """Each head's predictions from one view, and the other view's projections, which get no gradient."""
        check_heads(predictions1, predictions2, ("predictions1", "predictions2"), 1)
        check_views(targets1, targets2, ("targets1", "targets2"), fewest=1)
        shape = tuple(predictions1.shape[1:])
        require(
            targets1.shape == shape, "targets1", tuple(targets1.shape), f"of shape {shape}, as a head's predictions"
        )
        with full_precision(predictions1):
            loss = self._one_way(predictions1, targets2) + self._one_way(predictions2, targets1)
        return reduce(loss, self.reduction).to(predictions1.dtype)

    def _one_way(self, predictions: Float[Tensor, "c n d"], targets: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        z, h = unit(predictions), unit(targets.detach()).expand_as(predictions)
        temperature: Tensor = self.temperature(z, h)
        return (self.beta * omega(temperature, z.shape[-1]) - (z * h).sum(-1) / (2 * temperature)).sum(0)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}"


class BarlowAMCLLoss(nn.Module):
    """AMCL in the form of Barlow Twins (equation 2.3), of the projections (heads, n, d') of two views of n ≥ 2 samples.

    Pairs are of features here, not of samples: what a `PairTemperature` sees of each is its standardised values over
    the batch, so its `dim` is the batch size. The value belongs to the batch as a whole.

    Args:
        temperature: a `PairTemperature`, or a number for all pairs.
        beta: β ≥ 0, weight of Ω.
        off_diagonal: λ > 0, weight of the correlations of different features; the default is that of Barlow Twins.
    """

    def __init__(self, temperature: PairTemperature | float, beta: float = 0.1, *, off_diagonal: float = 0.005) -> None:
        super().__init__()
        check_beta(beta)
        check_temperature(off_diagonal, "off_diagonal")
        self.temperature = temperature if isinstance(temperature, nn.Module) else FixedTemperature(temperature)
        self.beta, self.off_diagonal = beta, off_diagonal

    def forward(self, views1: Float[Tensor, "c n d"], views2: Float[Tensor, "c n d"]) -> Float[Tensor, ""]:
        check_heads(views1, views2, ("views1", "views2"), 2)
        with full_precision(views1):
            first, second = (
                unit((view - view.mean(1, keepdim=True)).mT) for view in map(at_least_float32, (views1, views2))
            )
            correlation, temperature = first @ second.mT, self.temperature.all_pairs(first, second)
            d = correlation.shape[-1]
            diagonal = torch.eye(d, dtype=torch.bool, device=views1.device)
            same = (1.0 - correlation / temperature).square()
            different = self.off_diagonal * correlation.square() / temperature
            regulariser = self.beta * omega(temperature, d)
            loss = torch.where(diagonal, same + regulariser, different - regulariser).sum()
        return loss.to(views1.dtype)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, off_diagonal={self.off_diagonal}"
