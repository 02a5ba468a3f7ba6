"""Data Diet: scores of training examples, early in training, to prune the set by (Paul et al. 2021, arXiv:2107.07075).

With `p = softmax(z(x))` and one-hot y, after a little training from each of several random initialisations:

    EL2N(x, y)  = E ‖p - y‖₂                  in [0, √2]
    GraNd(x, y) = E ‖∇_w cross_entropy(z(x), y)‖₂   over all trainable parameters

Examples with low scores are learnt early and add little: keep those with the highest mean score and train from scratch
on them for *as many optimizer steps as on the full set*. The very highest scores are often wrong labels; the window
strategy leaves them out too. Forgetting counts (Toneva et al. 2019, arXiv:1812.05159) are the score that the paper
compares with: how often an example went from right to wrong between its evaluations in training.

Scores are taken in evaluation mode and without augmentation, averaged over ten initialisations in the paper, at epochs
10 to 20 of 200. As in the authors' code the mean is over norms, and kept indices come in data-set order; where scores
tie, the later example counts as the harder. Classes are not balanced by any of this.

The paper also finds GraNd informative at initialisation. A replication finds it no better than random there and
points to an error in how the framework of the time restored checkpoints (Kirsch 2023, arXiv:2303.14753).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from fairtrial.methods.arguments import require
from fairtrial.methods.evaluation import evaluating
from fairtrial.methods.losses.classification import check_scores
from fairtrial.methods.registry import Uniform, method

SCORING_MEMBERS = 3  # initialisations that a task's scores are averaged over; the paper takes 10
SCORING_FRACTION = 0.1  # of the task's training steps before scoring: epoch 20 of 200


def _score_all(
    model: nn.Module, loader: Iterable[Sequence[Tensor]], score: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " n"]:
    """Scores of single batches, put together in data-set order and checked for completeness."""
    device = next((parameter.device for parameter in model.parameters()), None)
    scores, indices = [], []
    for batch in loader:
        require(len(batch) in (2, 3), "loader", f"batches of {len(batch)}", "batches (x, y) or (x, y, index)")
        scores.append(score(batch[0].to(device), batch[1].to(device)))
        indices += [batch[2].to(device)] if len(batch) == 3 else []
    require(len(scores) > 0, "loader", loader, "at least one batch")
    require(len(indices) in (0, len(scores)), "loader", loader, "batches with indices always or never")
    flat = torch.cat(scores)
    if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__"):
        n = len(loader.dataset)
        require(len(flat) == n, "loader", f"{len(flat)} of {n} examples", "the whole data set, drop_last=False")
    if indices:
        order = torch.cat(indices).long()
        complete = torch.equal(order.sort().values, torch.arange(len(flat), device=order.device))
        require(complete, "loader", "indices missing or repeated", f"every index of 0..{len(flat) - 1} once")
        return torch.empty_like(flat).index_copy_(0, order, flat)
    if isinstance(loader, DataLoader):
        in_order = isinstance(loader.sampler, SequentialSampler)
        require(in_order, "loader", loader.sampler, "in data-set order, or batches must carry (x, y, index)")
    return flat


def _check_outputs(logits: Tensor, y: Tensor) -> None:
    require(logits.ndim == 2, "model", tuple(logits.shape), "a classifier with outputs of shape (n, classes)")
    check_scores(logits, y, name="y")


def el2n_scores(model: nn.Module, loader: Iterable[Sequence[Tensor]], *, ord: int = 2) -> Float[Tensor, " n"]:
    """Norm of the error vector `softmax(model(x)) - one_hot(y)` of every example, at the model's present weights.

    Average over initialisations with `average_scores`. The model is scored in evaluation mode and left in its own.

    Args:
        model: a classifier with outputs of shape (n, classes).
        loader: batches (x, y) of the whole training set in data-set order, or (x, y, index) in any order; without
            augmentation. y are class indices of shape (n,).
        ord: 2, or 1 for the L1 norm (an alternative in the authors' code; it is 2 (1 - p_y)).

    Returns:
        Scores in data-set order on the model's device, in float32 or better.

    Raises:
        ValueError: the loader shuffles without giving indices, or leaves examples out or repeats them.
    """
    require(ord in (1, 2), "ord", ord, "1 or 2")

    def score(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        _check_outputs(logits, y)
        p = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
        p.scatter_(1, y[:, None].long(), 0.0)
        p.scatter_(1, y[:, None].long(), -p.sum(1, keepdim=True))  # p_y - 1, exact where p_y is close to 1
        norm: Tensor = torch.linalg.vector_norm(p, ord, dim=1)
        return norm

    with evaluating(model), torch.no_grad():
        return _score_all(model, loader, score)


def grand_scores(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    params: Iterable[nn.Parameter] | None = None,
    *,
    chunk_size: int = 64,
) -> Float[Tensor, " n"]:
    """Norm of every example's own cross-entropy gradient, at the model's present weights; exact.

    Args:
        model, loader: as in `el2n_scores`. The forward pass must be one that `torch.func.vmap` can map.
        params: parameters to take the gradient in; by default all that require one. A linear last layer alone gives
            `‖p - y‖₂ √(1 + ‖features‖²)`.
        chunk_size: examples whose gradients are held at a time, at least 1: memory is that many times `params`.

    Returns, raises: as `el2n_scores`, and ValueError if `params` is empty or not all of `model`.
    """
    require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
    wanted = {id(parameter) for parameter in params} if params is not None else None
    chosen: dict[str, Tensor] = {}
    held = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        is_chosen = parameter.requires_grad if wanted is None else id(parameter) in wanted
        (chosen if is_chosen else held)[name] = parameter.detach()
    require(len(chosen) > 0, "params", params, "at least one parameter of the model")
    require(wanted is None or len(chosen) == len(wanted), "params", params, "parameters of the model only")

    def loss(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(model, (chosen, held), (x[None],))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y[None].long())

    def gradient_norm(x: Tensor, y: Tensor) -> Tensor:
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
            for g in grad(loss)(chosen, x, y).values()
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def score(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            _check_outputs(model(x[:1]).repeat_interleave(len(y), 0), y)
        return vmap(gradient_norm, chunk_size=chunk_size)(x, y)

    with evaluating(model):
        return _score_all(model, loader, score)


class ForgettingTracker:
    """Forgetting counts of n examples: transitions from right to wrong between their evaluations in training.

    Call `update` with every training batch. The state before an example's first evaluation is wrong.

    Args:
        n: number of training examples, at least 1.
        device: where the counts are held; batches are brought there.
    """

    def __init__(self, n: int, *, device: torch.device | str | None = None) -> None:
        require(n >= 1, "n", n, "at least 1")
        self.counts = torch.zeros(n, dtype=torch.long, device=device)
        self.was_correct = torch.zeros(n, dtype=torch.bool, device=device)
        self.ever_correct = torch.zeros(n, dtype=torch.bool, device=device)

    def update(self, indices: Int[Tensor, " b"], correct: Bool[Tensor, " b"]) -> None:
        """Take in one batch: the data-set indices of its examples, each once, and whether each was classified right."""
        n = len(self.counts)
        if indices.device.type == "cpu" and len(indices) > 0:
            low, high = int(indices.min()), int(indices.max())
            require(low >= 0 and high < n, "indices", f"{low}..{high}", f"within 0..{n - 1}")
            require(len(indices.unique()) == len(indices), "indices", indices.tolist(), "each example at most once")
        indices, correct = indices.to(self.counts.device).long(), correct.to(self.counts.device)
        self.counts[indices] += self.was_correct[indices] & ~correct
        self.was_correct[indices] = correct
        self.ever_correct[indices] |= correct

    def scores(self) -> Float[Tensor, " n"]:
        """The counts so far; infinite for examples that were never classified right."""
        return self.counts.float().masked_fill(~self.ever_correct, float("inf"))


def average_scores(scores: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """Mean score of every example over runs from different initialisations.

    Raises:
        ValueError: no runs, runs of different lengths, or a score that is NaN.
    """
    require(len(scores) > 0, "scores", scores, "of at least one run")
    shapes = {tuple(run.shape) for run in scores}
    require(len(shapes) == 1, "scores", sorted(shapes), "of one length in all runs")
    mean = torch.stack(list(scores)).mean(0)
    require(not mean.isnan().any(), "scores", "NaN", "free of NaN")
    return mean


def prune_indices(
    scores: Float[Tensor, " n"],
    keep: int | float,
    strategy: str = "hardest",
    offset: int = 0,
) -> Int[Tensor, " kept"]:
    """Indices of the examples to keep, in data-set order, on the scores' device.

    Args:
        scores: one for each example; infinite ones count as the highest.
        keep: how many: a count in 1..n if an int, a fraction of n in (0, 1] if a float.
        strategy: 'hardest' keeps the highest scores, 'easiest' the lowest; 'window' leaves the `offset` lowest out
            and keeps the next ones, and so drops the highest too.
        offset: for 'window' alone; at most n less what is kept.
    """
    n = len(scores)
    require(n > 0, "scores", tuple(scores.shape), "of at least one example")
    require(not scores.isnan().any(), "scores", "NaN", "free of NaN")
    accepted = 1 <= keep <= n if isinstance(keep, int) else 0 < keep <= 1
    require(accepted, "keep", keep, f"a count (int) in 1..{n} or a fraction (float) in (0, 1]")
    kept = keep if isinstance(keep, int) else max(1, round(keep * n))
    require(strategy in ("hardest", "easiest", "window"), "strategy", strategy, "'hardest', 'easiest' or 'window'")
    require(0 <= offset <= n - kept, "offset", offset, f"within 0..{n - kept}, what is not kept")
    require(offset == 0 or strategy == "window", "offset", offset, "0 unless strategy is 'window'")
    start = n - kept if strategy == "hardest" else offset
    return scores.argsort(stable=True)[start : start + kept].sort().values


def _early_el2n(setting: Any) -> Float[Tensor, " n"]:
    models = (setting.pretrain(SCORING_FRACTION, member) for member in range(SCORING_MEMBERS))
    return average_scores([el2n_scores(model, setting.score_batches()) for model in models])


@method(
    paper="data_diet",
    slot="sampler",
    search={"keep": Uniform(0.5, 1.0)},
    bind=lambda setting: {"scores": partial(_early_el2n, setting), "generator": setting.generator},
)
class PrunedSampler(Sampler[int]):
    """Each epoch a fresh permutation of the examples that `prune_indices` keeps.

    An epoch is shorter than one of the full set; the paper's comparison is at an equal number of optimizer steps.

    Args:
        scores: one for each example, or a function of no arguments that computes them. In a task it is bound to EL2N
            averaged over `SCORING_MEMBERS` initialisations after `SCORING_FRACTION` of the training steps.
        keep, strategy, offset: as in `prune_indices`. The default of 0.7 is cautious: the paper keeps half of CIFAR-10.
        generator: source of the permutations; by default one of the sampler's own, seeded by `torch.initial_seed()`.

    Attributes:
        indices: the kept examples, in data-set order.
    """

    def __init__(
        self,
        scores: Float[Tensor, " n"] | Callable[[], Float[Tensor, " n"]],
        keep: int | float = 0.7,
        strategy: str = "hardest",
        offset: int = 0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        values = scores if isinstance(scores, Tensor) else scores()
        self.indices = prune_indices(values, keep, strategy, offset).cpu()
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.indices), generator=self.generator)
        yield from self.indices[order].tolist()

    def __len__(self) -> int:
        return len(self.indices)
