"""Metrix: mixup for metric learning (Venkataramanan et al., ICLR 2022, arXiv:2106.04990).

Mixup needs a loss that adds up over examples, and those of metric learning do not. The way out is to write them as
functions of sums over an anchor's examples, in which an example counts as positive with weight y and as negative with
weight 1 - y. With s the cosine similarity of example v to the anchor,

    l = τ( σ⁺( Σ_v y_v ρ⁺(s_v) )  +  σ⁻( Σ_v (1 - y_v) ρ⁻(s_v) ) )

                        τ     σ⁺                σ⁻                ρ⁺                  ρ⁻
    contrastive         x     x                 x                 -s                  max(0, s - m)
    lifted structure    [x]₊  log x             log x             exp(-s)             exp(s - m)
    binomial deviance   x     x                 x                 log(1 + e^-β(s-m))  log(1 + e^γ(s-m))
    multi-similarity    x     log(1 + x) / β    log(1 + x) / γ    exp(-β (s - m))     exp(γ (s - m))
    proxy anchor        as multi-similarity, the anchors being proxies of the classes in the batch
    NCA                 x     -log x            log x             exp(s)              exp(s)

Clean examples have y in {0, 1}. Mixed ones are v = λ x + (1 - λ) x' with y = λ, λ ~ Beta(α, α), where x' is a negative
of the anchor and x either one of its positives or the anchor itself; a coin decides which of the two at each step.
With w the weight of mixing, the loss is mean over anchors of l(clean) + w l(mixed).

What is mixed may be inputs, features or embeddings. Embeddings are mixed inside the loss, and without being formed:
for unit vectors s(a, v) = (λ s(a, x) + (1 - λ) s(a, x')) / |v|, and |v|² follows from s(x, x'). For the others
`mix_inputs` gives the mixed inputs, and the loss is told what their embeddings are.

Open in the paper, or different in the authors' code (github.com/billpsomas/Metrix_ICLR22, contrastive loss only):

- λ is drawn for each anchor; the code draws one for the whole batch, which has the same mean and a larger variance.
- Of all pairs of a positive and a negative each negative is taken once, with a positive drawn at random: n² mixed
  examples for n anchors, not n³. An anchor without positives stands in for them itself.
- The code measures distances instead of similarities, averages each sum over its non-zero terms, pairs every negative
  with the first of the positives, and looks for the hardest negatives with indices of another list. Here the paper's
  sums and pairs are taken, and the hardest negatives are the most similar ones.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import betaincinv
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.metric_learning import NOTHING, check_embeddings, dot_products, pairs_of, unit
from fairtrial.methods.registry import Categorical, LogUniform, method

Function = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    return x


def line(s: Tensor, *, slope: float, margin: float = 0.0) -> Tensor:
    return slope * (s - margin)


def hinge(s: Tensor, *, margin: float) -> Tensor:
    return (s - margin).relu()


def soft_hinge(s: Tensor, *, slope: float, margin: float) -> Tensor:
    """log(1 + exp(slope (s - margin)))."""
    return F.softplus(slope * (s - margin))


def shared_softplus(log_x: Tensor, *, slope: float) -> Tensor:
    """log(1 + x) / slope."""
    return F.softplus(log_x) / slope


class GenericPairLoss(nn.Module):
    """An anchor's loss as a function of sums over its examples; see the table above.

    Args:
        rho_pos: ρ⁺ of similarities.
        rho_neg: ρ⁻ of similarities.
        sigma_pos: σ⁺ of the positives' sum.
        sigma_neg: σ⁻ of the negatives' sum.
        tau: τ of both.
        log_domain: ρ give exponents: Σ y exp(ρ) is summed, and its logarithm is what σ take. Nothing overflows so.
        needs_both: an anchor counts as 0 if it has no weight on one of the sides, whose σ would be log 0.
    """

    def __init__(
        self,
        rho_pos: Function,
        rho_neg: Function,
        sigma_pos: Function = identity,
        sigma_neg: Function = identity,
        tau: Function = identity,
        *,
        log_domain: bool = False,
        needs_both: bool = False,
    ) -> None:
        super().__init__()
        self.rho_pos, self.rho_neg, self.sigma_pos, self.sigma_neg = rho_pos, rho_neg, sigma_pos, sigma_neg
        self.tau, self.log_domain, self.needs_both = tau, log_domain, needs_both

    def forward(
        self,
        sim: Float[Tensor, "a v"],
        y: Shaped[Tensor, "a v"],
        mask: Bool[Tensor, "a v"] | None = None,
    ) -> Float[Tensor, " a"]:
        """The loss of each anchor.

        Args:
            sim: similarities of examples to anchors.
            y: how far each example is a positive of its anchor, within [0, 1].
            mask: examples that count; by default all.
        """
        require(y.shape == sim.shape, "y", tuple(y.shape), f"of shape {tuple(sim.shape)}")
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():
            low, high = float(y.min()), float(y.max())
            require(low >= 0 and high <= 1, "y", f"{low}..{high}", "within [0, 1]")
        y = y.to(sim.dtype)
        positive, negative = (y, 1.0 - y) if mask is None else (y * mask, (1.0 - y) * mask)
        attraction = self.sigma_pos(self._sum(self.rho_pos(sim), positive))
        loss = self.tau(attraction + self.sigma_neg(self._sum(self.rho_neg(sim), negative)))
        if not self.needs_both:
            return loss
        return loss.masked_fill(~((positive > 0).any(1) & (negative > 0).any(1)), 0.0)

    def _sum(self, rho: Float[Tensor, "a v"], weight: Float[Tensor, "a v"]) -> Float[Tensor, " a"]:
        if not self.log_domain:
            return (weight * rho).sum(1)
        counts = weight > 0
        return (rho + weight.masked_fill(~counts, 1.0).log()).masked_fill(~counts, NOTHING).logsumexp(1)

    def extra_repr(self) -> str:
        names = ("rho_pos", "rho_neg", "sigma_pos", "sigma_neg", "tau")
        functions = ", ".join(f"{name}={_named(getattr(self, name))}" for name in names)
        return f"{functions}, log_domain={self.log_domain}, needs_both={self.needs_both}"


def _named(function: Function) -> str:
    if not isinstance(function, partial):
        return getattr(function, "__name__", repr(function))
    return f"{function.func.__name__}({', '.join(f'{name}={value}' for name, value in function.keywords.items())})"


def contrastive(margin: float = 0.5) -> GenericPairLoss:
    return GenericPairLoss(partial(line, slope=-1.0), partial(hinge, margin=margin))


def lifted_structure(margin: float = 0.5) -> GenericPairLoss:
    rho_pos, rho_neg = partial(line, slope=-1.0), partial(line, slope=1.0, margin=margin)
    return GenericPairLoss(rho_pos, rho_neg, tau=torch.relu, log_domain=True, needs_both=True)


def binomial_deviance(beta: float = 2.0, gamma: float = 50.0, margin: float = 0.5) -> GenericPairLoss:
    return GenericPairLoss(
        partial(soft_hinge, slope=-beta, margin=margin), partial(soft_hinge, slope=gamma, margin=margin)
    )


def multi_similarity(beta: float = 2.0, gamma: float = 50.0, margin: float = 0.5) -> GenericPairLoss:
    return GenericPairLoss(
        partial(line, slope=-beta, margin=margin),
        partial(line, slope=gamma, margin=margin),
        partial(shared_softplus, slope=beta),
        partial(shared_softplus, slope=gamma),
        log_domain=True,
    )


def proxy_anchor(scale: float = 32.0, margin: float = 0.1) -> GenericPairLoss:
    """Multi-similarity; scale and margin are our choice. The loss that goes by this name has s + m for negatives."""
    return multi_similarity(scale, scale, margin)


def nca() -> GenericPairLoss:
    return GenericPairLoss(identity, identity, torch.neg, log_domain=True, needs_both=True)


PRESETS: dict[str, Callable[[], GenericPairLoss]] = {
    "contrastive": contrastive,
    "lifted_structure": lifted_structure,
    "binomial_deviance": binomial_deviance,
    "multi_similarity": multi_similarity,
    "proxy_anchor": proxy_anchor,
    "nca": nca,
}


class Mixture(NamedTuple):
    """What is mixed for each of a anchors: k examples v = λ x + (1 - λ) x'.

    Attributes:
        first: rows of x in the batch, or None where it is the anchor itself.
        second: rows of x'.
        lam: λ of the anchor.
        valid: whether x' is a negative of the anchor; some have fewer than k.
    """

    first: Int[Tensor, "a k"] | None
    second: Int[Tensor, "a k"]
    lam: Float[Tensor, "a 1"]
    valid: Bool[Tensor, "a k"]


@method(
    paper="metrix",
    slot="embedding_loss",
    search={"loss": Categorical(["contrastive", "multi_similarity"]), "weight": LogUniform(0.05, 1.0)},
    bind=lambda setting: {
        "num_classes": setting.num_classes,
        "embedding_dim": setting.embedding_dim,
        "generator": setting.generator,
    },
)
class MetricMix(nn.Module):
    """A metric-learning loss with mixup, of embeddings (n, d), which need not be normalised, and class labels (n,).

    In eval mode, and in a batch in which no anchor has a negative, nothing is mixed.

    With `mode` 'input' or 'feature' the model is asked twice:

        mixed, mixture = loss.mix_inputs(x, embeddings, labels)
        loss(embeddings, labels, model(mixed), mixture)

    where x are inputs, or features of a layer and `model` what follows it.

    Args:
        loss: 'contrastive', 'multi_similarity', 'proxy_anchor', 'lifted_structure', 'binomial_deviance', 'nca', or a
            `GenericPairLoss`. Proxies are weights of the loss, to be given to the optimizer.
        mode: what is mixed, 'embedding', 'input' or 'feature'.
        alpha: α > 0 of the Beta distribution.
        weight: w ≥ 0 of the mixed loss; at 0 nothing is mixed.
        pairs: 'posneg' mixes positives with negatives, 'ancneg' the anchor with negatives, 'random' one or the other.
        negatives: mix with so many negatives of each anchor, the hardest; by default with the hardest one in mode
            'input', with all of them else.
        num_classes: number of proxies; needed with 'proxy_anchor' only, as is
        embedding_dim: the size of an embedding.
        generator: what is drawn from, on the CPU; by default one of the loss's own, seeded by `torch.initial_seed()`.

    The value belongs to the batch as a whole. λ comes from SciPy, which `torch.compile(fullgraph=True)` cannot take.
    """

    proxies: nn.Parameter | None

    def __init__(
        self,
        loss: str | GenericPairLoss = "multi_similarity",
        mode: str = "embedding",
        alpha: float = 2.0,
        weight: float = 0.4,
        pairs: str = "random",
        *,
        negatives: int | None = None,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        known = isinstance(loss, GenericPairLoss) or loss in PRESETS
        require(known, "loss", loss, f"one of {', '.join(PRESETS)}, or a GenericPairLoss")
        require(mode in ("embedding", "input", "feature"), "mode", mode, "'embedding', 'input' or 'feature'")
        require(0 < alpha < float("inf"), "alpha", alpha, "above 0 and finite")
        require(0 <= weight < float("inf"), "weight", weight, "at least 0 and finite")
        require(pairs in ("random", "posneg", "ancneg"), "pairs", pairs, "'random', 'posneg' or 'ancneg'")
        require(negatives is None or negatives >= 1, "negatives", negatives, "at least 1, or None")
        self.preset = loss if isinstance(loss, str) else None
        self.loss = PRESETS[loss]() if isinstance(loss, str) else loss
        self.mode, self.alpha, self.weight, self.pairs = mode, alpha, weight, pairs
        self.negatives, self.num_classes, self.embedding_dim = negatives, num_classes, embedding_dim
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self.proxies = None
        if loss == "proxy_anchor":
            count, size = num_classes or 0, embedding_dim or 0
            require(count >= 2, "num_classes", num_classes, "at least 2")
            require(size >= 1, "embedding_dim", embedding_dim, "at least 1")
            in_embeddings = mode == "embedding" or pairs == "posneg"
            require(in_embeddings, "pairs", pairs, "'posneg' where inputs are mixed: a proxy has none")
            self.proxies = nn.Parameter(torch.empty(count, size))
            nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(
        self,
        embeddings: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        mixed: Float[Tensor, "v d"] | None = None,
        mixture: Mixture | None = None,
    ) -> Float[Tensor, ""]:
        """The loss; `mixed` are the embeddings of what `mix_inputs` gave, in its order."""
        check_embeddings(embeddings, labels)
        require((mixed is None) == (mixture is None), "mixture", mixture, "given just where mixed is")
        needed = self.training and self.weight > 0 and self.mode != "embedding"
        require(not needed or mixed is not None, "mixed", None, f"given in mode {self.mode!r}")
        rows = unit(embeddings)
        anchors, positives, negatives = self._anchors(rows, labels)
        similarity = dot_products(anchors, rows)
        either = positives | negatives
        there = positives.any(1) if self.proxies is not None else either.any(1)
        total: Tensor = self.loss(similarity, positives, either)
        if self.training and self.weight > 0:
            if mixed is None or mixture is None:
                mixture = self._draw(similarity, positives, negatives)
                to_mixed = _similarities_to_mixed(similarity, dot_products(rows, rows), mixture)
            else:
                to_mixed = _similarities_in_turn(anchors, mixed, mixture)
            soft = mixture.lam.to(similarity).expand_as(to_mixed)
            added = self.loss(to_mixed, soft, mixture.valid).masked_fill(~mixture.valid.any(1), 0.0)
            total = total + self.weight * added
        return (total.masked_fill(~there, 0.0).sum() / there.sum().clamp(min=1)).to(embeddings.dtype)

    def mix_inputs(
        self, x: Float[Tensor, "n *shape"], embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "v *shape"], Mixture]:
        """Mixed inputs or features, k for each anchor in turn, and how they came about.

        Args:
            x: what to mix, one row for each embedding.
            embeddings: of x as it is; they decide which negatives are the hardest.
            labels: class labels.
        """
        check_embeddings(embeddings, labels)
        require(x.shape[:1] == labels.shape, "x", tuple(x.shape), f"{len(labels)} rows")
        rows = unit(embeddings.detach())
        anchors, positives, negatives = self._anchors(rows, labels)
        mixture = self._draw(dot_products(anchors, rows), positives, negatives)
        first = torch.arange(len(x), device=x.device)[:, None] if mixture.first is None else mixture.first
        lam = mixture.lam.expand_as(mixture.second).flatten().to(x).view(-1, *(1 for _ in x.shape[1:]))
        second = x[mixture.second.flatten()]
        return torch.lerp(second, x[first.expand_as(mixture.second).flatten()], lam), mixture

    def _anchors(
        self, rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "a d"], Bool[Tensor, "a n"], Bool[Tensor, "a n"]]:
        """Anchors, and which of the batch are their positives and negatives."""
        if self.proxies is None:
            return rows, *pairs_of(labels)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high, last = int(labels.min()), int(labels.max()), len(self.proxies) - 1
            require(low >= 0 and high <= last, "labels", f"{low}..{high}", f"within 0..{last}")
        positives = torch.arange(len(self.proxies), device=labels.device)[:, None] == labels
        return unit(self.proxies).to(rows), positives, ~positives

    def _draw(
        self, similarity: Float[Tensor, "a n"], positives: Bool[Tensor, "a n"], negatives: Bool[Tensor, "a n"]
    ) -> Mixture:
        count, n = similarity.shape
        u = torch.rand(count, 1, dtype=torch.float64, generator=self.generator)
        lam = torch.from_numpy(betaincinv(self.alpha, self.alpha, u.numpy())).to(similarity)
        by_coin = torch.rand((), generator=self.generator).item() < 0.5
        places = torch.rand(count, n, generator=self.generator).to(similarity)
        wanted = self.negatives or (1 if self.mode == "input" else n)
        hardest = similarity.detach().masked_fill(~negatives, -torch.inf).topk(min(wanted, n), dim=1)
        valid = hardest.values > -torch.inf
        if self.pairs == "ancneg" or (self.pairs == "random" and by_coin):
            return Mixture(None, hardest.indices, lam, valid)
        order = positives.to(torch.int8).argsort(
            dim=1, descending=True, stable=True
        )  # an anchor's positives come first
        number = positives.sum(1, keepdim=True)
        first = order.gather(1, (places * number).long().clamp(max=n - 1)).gather(1, hardest.indices)
        itself = torch.arange(count, device=first.device)[:, None]
        return Mixture(torch.where(number > 0, first, itself.clamp(max=n - 1)), hardest.indices, lam, valid)

    def extra_repr(self) -> str:
        return (
            f"loss={self.preset!r}, mode={self.mode!r}, alpha={self.alpha}, weight={self.weight}, "
            f"pairs={self.pairs!r}, negatives={self.negatives}, num_classes={self.num_classes}, "
            f"embedding_dim={self.embedding_dim}"
        )


def _similarities_to_mixed(
    similarity: Float[Tensor, "a n"], among: Float[Tensor, "n n"], mixture: Mixture
) -> Float[Tensor, "a k"]:
    """Cosines of anchors to mixed unit vectors, from those to what is mixed."""
    lam, to_second = mixture.lam.to(similarity), similarity.gather(1, mixture.second)
    if mixture.first is None:
        to_first, between = torch.ones_like(to_second), to_second
    else:
        to_first, between = similarity.gather(1, mixture.first), among[mixture.first, mixture.second]
    squared_length = lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * between
    return (lam * to_first + (1 - lam) * to_second) / squared_length.clamp(min=1e-12).sqrt()


def _similarities_in_turn(
    anchors: Float[Tensor, "a d"], mixed: Float[Tensor, "v d"], mixture: Mixture
) -> Float[Tensor, "a k"]:
    """Cosines of anchors to the k embeddings of what was mixed for each."""
    count = mixture.second.numel()
    require(mixed.shape == (count, anchors.shape[1]), "mixed", tuple(mixed.shape), f"{count} embeddings")
    rows: Tensor = unit(mixed).view(*mixture.second.shape, -1)
    return (anchors[:, None] * rows).sum(2)


@torch.no_grad()
def utilization(queries: Float[Tensor, "q d"], examples: Float[Tensor, "x d"]) -> Float[Tensor, ""]:
    """Mean squared distance from a query to its nearest example: low where examples cover the queries' region.

    The definition is from memory of the paper.
    """
    require(queries.ndim == 2 and len(queries) > 0, "queries", tuple(queries.shape), "of shape (q ≥ 1, d)")
    fits = examples.ndim == 2 and len(examples) > 0 and examples.shape[1:] == queries.shape[1:]
    require(fits, "examples", tuple(examples.shape), f"of shape (x ≥ 1, {queries.shape[-1]})")
    distances = torch.cdist(queries, examples, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.amin(1).square().mean()
