"""SAF and MESA: flat minima by a loss on the model's own past (Du et al. 2022, arXiv:2205.14083).

A sharp drop of the loss on a sample shows in its outputs. SAF compares the scores z that a sample gets with those that
it got Ẽ epochs ago, and adds the divergence to the cross entropy, in epochs e with start < e < end (both strictly):

    L = CE(z, y) + λ τ² KL(softmax(z_past / τ) ‖ softmax(z / τ)),    mean over the batch

The past is a constant. Scores are recorded as they come up in training, of the augmented inputs and from epoch 0 on,
in a ring of Ẽ + 1 slots for each sample: samples · classes · (Ẽ + 1) numbers are the only price. MESA needs no such
memory but a further forward pass: its z_past are the scores of a moving average of the weights.

The factor τ² is that of the authors' code; the paper's formula has none (`scale_tau2=False`). Their parsers have λ =
0.16 for SAF and 0.3 for MESA, their README says "0.3/0.8", which are the defaults here. What a sample got in a slot is
used only if it is of the right epoch: where samples are left out or drawn with replacement, the code would compare with
an older epoch, or with zeros.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from fairtrial.methods.arguments import require
from fairtrial.methods.losses.classification import at_least_float32, check_reduction, check_scores, reduce
from fairtrial.methods.registry import LogUniform, method

NEVER = torch.iinfo(torch.int64).min  # the epoch of a slot that is empty


def trajectory_divergence(
    input: Float[Tensor, "n c"], past: Float[Tensor, "n c"], tau: float = 5.0
) -> Float[Tensor, " n"]:
    """KL(softmax(past / τ) ‖ softmax(input / τ)) of each row; no gradient goes into the past."""
    p = (past.detach() / tau).softmax(1)
    return F.kl_div((input / tau).log_softmax(1), p, reduction="none").sum(1)


def _start_epoch(setting: Any) -> int:
    """The fifth epoch, or where training is short the authors' other advice: after 30 % of the epochs."""
    return min(5, int(0.3 * setting.total_steps / setting.steps_per_epoch))


@method(
    paper="saf",
    slot="loss",
    search={"lam": LogUniform(0.1, 1.0)},
    bind=lambda setting: {
        "num_samples": setting.num_samples,
        "num_classes": setting.num_classes,
        "steps_per_epoch": setting.steps_per_epoch,
        "start_epoch": _start_epoch(setting),
    },
)
class TrajectoryLoss(nn.Module):
    """SAF's loss of scores (n, classes), class indices (n,) and the samples' indices in the training set (n,).

    A call in training mode records the scores. In eval mode the loss is cross entropy and nothing is recorded. A sample
    without scores of the right epoch has cross entropy alone. If one comes up more than once in an epoch, the last
    scores stay. Under data parallelism each process has the past of the samples that it has seen.

    Args:
        num_samples: size of the training set.
        num_classes: number of classes.
        lam: λ, at least 0; the paper's are 0.3 and 0.8.
        tau: temperature τ, above 0.
        delay: Ẽ, how many epochs ago, at least 1; the paper's are 2 and 3.
        start_epoch: the first epoch with the term is the next; 5, or about 30 % of all epochs.
        end_epoch: the last epoch with the term is the one before; None for no end.
        scale_tau2: with the factor τ².
        steps_per_epoch: calls in training mode that make an epoch, by which epochs are counted where `forward` is not
            told.
        persistent: keep the recorded scores in the state_dict. Without, a resumed run has cross entropy until it has a
            past again.
        device: where the scores are kept; as a part of a model they move along with it.
        dtype: what they are kept in; those beyond its range are brought to its ends.
        reduction: 'none', 'mean' or 'sum'.

    Raises:
        ValueError: an argument lies outside its range, or scores, targets and indices do not fit together.
    """

    history: Float[Tensor, "samples slots c"]
    epochs: Int[Tensor, "samples slots"]
    calls: Int[Tensor, ""]

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        lam: float = 0.3,
        tau: float = 5.0,
        delay: int = 3,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        *,
        scale_tau2: bool = True,
        steps_per_epoch: int | None = None,
        persistent: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float16,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        require(num_samples >= 1, "num_samples", num_samples, "at least 1")
        require(num_classes >= 2, "num_classes", num_classes, "at least 2")
        check_divergence(lam, tau)
        require(isinstance(delay, int) and delay >= 1, "delay", delay, "a whole number of at least 1")
        require(steps_per_epoch is None or steps_per_epoch >= 1, "steps_per_epoch", steps_per_epoch, "at least 1")
        require(dtype.is_floating_point, "dtype", dtype, "floating-point")
        check_reduction(reduction)
        self.lam, self.tau, self.delay, self.start_epoch, self.end_epoch = lam, tau, delay, start_epoch, end_epoch
        self.scale_tau2, self.steps_per_epoch, self.persistent = scale_tau2, steps_per_epoch, persistent
        self.reduction = reduction
        slots = num_samples, delay + 1
        history = torch.zeros(*slots, num_classes, dtype=dtype, device=device)
        self.register_buffer("history", history, persistent=persistent)
        self.register_buffer("epochs", torch.full(slots, NEVER, device=device), persistent=persistent)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device))

    def forward(
        self,
        input: Float[Tensor, "..."],
        target: Int[Tensor, "..."],
        index: Int[Tensor, "..."],
        epoch: int | None = None,
    ) -> Float[Tensor, "..."]:
        """The loss; `epoch` is the number of the epoch, from 0, by default the calls divided by `steps_per_epoch`."""
        check_scores(input, target)
        classes = self.history.shape[2]
        require(input.shape[1] == classes, "input", tuple(input.shape), f"scores of {classes} classes")
        self._check_index(index, len(input))
        scores = at_least_float32(input)
        losses = F.cross_entropy(scores, target.long(), reduction="none")
        if self.training:
            active, past = self._turn(scores.detach(), index.to(self.history.device, torch.int64), epoch)
            divergence = active.to(scores) * trajectory_divergence(scores, past.to(scores), self.tau)
            losses = losses + weight_of(self.lam, self.tau, self.scale_tau2) * divergence
        return reduce(losses, self.reduction).to(input.dtype)

    def _turn(
        self, scores: Float[Tensor, "n c"], index: Int[Tensor, " n"], epoch: int | None
    ) -> tuple[Bool[Tensor, " n"], Float[Tensor, "n c"]]:
        """Record the scores; returns which samples have the term, and the scores of the past."""
        if epoch is not None:
            now = torch.full_like(self.calls, epoch)
        elif self.steps_per_epoch is None:
            raise ValueError("epoch must be given where steps_per_epoch is not, got None")
        else:
            now = self.calls // self.steps_per_epoch
            self.calls += 1
        now = now.view(1)  # as an index without dimensions it would be read, and waited for
        slots, limit = self.delay + 1, torch.finfo(self.history.dtype).max
        self.history[index, now % slots] = scores.clamp(-limit, limit).to(self.history)
        self.epochs[index, now % slots] = now
        then = now - self.delay
        active = (self.epochs[index, then % slots] == then) & (now > self.start_epoch)
        if self.end_epoch is not None:
            active = active & (now < self.end_epoch)
        return active, self.history[index, then % slots]

    def _check_index(self, index: Tensor, n: int) -> None:
        integer = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
        require(integer, "index", index.dtype, "integer sample indices")
        require(index.shape == (n,), "index", tuple(index.shape), f"of shape {(n,)}, one per row")
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high, last = int(index.min()), int(index.max()), len(self.history) - 1
            require(low >= 0 and high <= last, "index", f"{low}..{high}", f"within 0..{last}")

    def extra_repr(self) -> str:
        samples, _, classes = self.history.shape
        return (
            f"num_samples={samples}, num_classes={classes}, lam={self.lam}, tau={self.tau}, delay={self.delay}, "
            f"start_epoch={self.start_epoch}, end_epoch={self.end_epoch}, scale_tau2={self.scale_tau2}, "
            f"steps_per_epoch={self.steps_per_epoch}, persistent={self.persistent}, device={self.history.device}, "
            f"dtype={self.history.dtype}, reduction={self.reduction!r}"
        )


class MESALoss(nn.Module):
    """MESA's loss of scores (n, classes), class indices (n,) and the scores of the averaged model (n, classes).

    The averaged model, `mesa_teacher(model)`, sees the same inputs before the step, without gradient, and is updated
    after it:

        with torch.no_grad():
            ema_logits = teacher(x)
        loss = criterion(model(x), y, ema_logits, epoch)
        …
        optimizer.step()
        teacher.update_parameters(model)

    It is the teacher only: what is trained, and evaluated, is the model.

    Args:
        lam: λ, at least 0; the authors' are 0.3 and 0.8.
        tau: temperature τ, above 0.
        start_epoch: the first epoch with the term is the next.
        reduction: 'none', 'mean' or 'sum'.

    Raises:
        ValueError: an argument lies outside its range, or scores and targets do not fit together.
    """

    def __init__(self, lam: float = 0.8, tau: float = 5.0, start_epoch: int = 5, *, reduction: str = "mean") -> None:
        super().__init__()
        check_divergence(lam, tau)
        check_reduction(reduction)
        self.lam, self.tau, self.start_epoch, self.reduction = lam, tau, start_epoch, reduction

    def forward(
        self, input: Float[Tensor, "..."], target: Int[Tensor, "..."], ema_logits: Float[Tensor, "..."], epoch: int
    ) -> Float[Tensor, "..."]:
        check_scores(input, target)
        require(ema_logits.shape == input.shape, "ema_logits", tuple(ema_logits.shape), f"of shape {input.shape}")
        scores = at_least_float32(input)
        losses = F.cross_entropy(scores, target.long(), reduction="none")
        if epoch > self.start_epoch:
            losses = losses + weight_of(self.lam, self.tau) * trajectory_divergence(
                scores, ema_logits.to(scores), self.tau
            )
        return reduce(losses, self.reduction).to(input.dtype)

    def extra_repr(self) -> str:
        return f"lam={self.lam}, tau={self.tau}, start_epoch={self.start_epoch}, reduction={self.reduction!r}"


def check_divergence(lam: float, tau: float) -> None:
    require(0 <= lam < math.inf, "lam", lam, "at least 0 and finite")
    require(0 < tau < math.inf, "tau", tau, "above 0 and finite")


def weight_of(lam: float, tau: float, scale_tau2: bool = True) -> float:
    """λ τ², or λ."""
    return lam * tau**2 if scale_tau2 else lam


def mesa_teacher(model: nn.Module, decay: float = 0.9998) -> AveragedModel:
    """The moving average of a model's weights and buffers, θ̄ ← decay · θ̄ + (1 - decay) θ, from the present ones on.

    In evaluation mode and without gradients. Call `update_parameters(model)` after every optimizer step.

    Args:
        model: the one that is trained.
        decay: within [0, 1); 0.9998 is the authors', whose runs have some 30,000 steps: shorter ones need a shorter
            memory.
    """
    require(0 <= decay < 1, "decay", decay, "within [0, 1)")
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    teacher.n_averaged += 1  # the initial weights are the first of the average
    return teacher.eval().requires_grad_(False)


class IndexedDataset(Dataset[tuple[Any, ...]]):
    """A dataset that gives each sample's index before the sample: (index, x, y), for `TrajectoryLoss`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (index, *self.dataset[index])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]
