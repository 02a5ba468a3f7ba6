"""What PyTorch users reach for anyway: the baselines that stand beside the papers' methods in every slot."""

from collections.abc import Iterator

import torch
from jaxtyping import Shaped
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler as schedules

from fairtrial.methods.data.mixing import Mixup
from fairtrial.methods.registry import LogUniform, Method, Uniform


class NoTransform:
    """The batch as it is."""

    def __call__(
        self, x: Shaped[Tensor, "n ..."], y: Shaped[Tensor, " n"], generator: torch.Generator
    ) -> tuple[Shaped[Tensor, "n ..."], Shaped[Tensor, " n"]]:
        return x, y


class RandomSampler(torch.utils.data.Sampler[int]):
    """Every sample once in an epoch, in random order; as torch's, but without going through a generator for each.

    Args:
        num_samples: size of the training set.
        generator: what the order is drawn from.
    """

    def __init__(self, num_samples: int, generator: torch.Generator) -> None:
        self.num_samples, self.generator = num_samples, generator

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.num_samples, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.num_samples


def no_surgery(model: nn.Module) -> nn.Module:
    """The model as it is."""
    return model


def constant(optimizer: optim.Optimizer) -> schedules.LRScheduler:
    """The learning rate as it is."""
    return schedules.ConstantLR(optimizer, factor=1.0, total_iters=0)


def initial_rates(optimizer: optim.Optimizer) -> list[float]:
    """The learning rate of every parameter group, before any schedule."""
    return [group["lr"] for group in optimizer.param_groups]


OPTIMIZERS = (
    Method("AdamW", "optimizer", optim.AdamW, {"lr": LogUniform(1e-4, 1e-1)}),
    Method("Adam", "optimizer", optim.Adam, {"lr": LogUniform(1e-4, 1e-1)}),
    Method("NAdam", "optimizer", optim.NAdam, {"lr": LogUniform(1e-4, 1e-1)}),
    Method("RAdam", "optimizer", optim.RAdam, {"lr": LogUniform(1e-4, 1e-1)}),
    Method("SGD", "optimizer", optim.SGD, {"lr": LogUniform(1e-3, 1.0)}, lambda setting: {"momentum": 0.9}),
    Method("RMSprop", "optimizer", optim.RMSprop, {"lr": LogUniform(1e-4, 1e-1)}),
    Method("Adagrad", "optimizer", optim.Adagrad, {"lr": LogUniform(1e-3, 1.0)}),
)

CLASSIFICATION_LOSSES = (
    Method("CrossEntropyLoss", "loss", nn.CrossEntropyLoss),
    Method("MultiMarginLoss", "loss", nn.MultiMarginLoss, {"margin": LogUniform(0.1, 10.0)}),
)

REGRESSION_LOSSES = (
    Method("MSELoss", "loss", nn.MSELoss),
    Method("L1Loss", "loss", nn.L1Loss),
    Method("HuberLoss", "loss", nn.HuberLoss, {"delta": LogUniform(0.1, 10.0)}),
    Method("SmoothL1Loss", "loss", nn.SmoothL1Loss, {"beta": LogUniform(0.1, 10.0)}),
)

SCHEDULES = (
    Method("Constant", "schedule", constant),
    Method(
        "CosineAnnealingLR",
        "schedule",
        schedules.CosineAnnealingLR,
        bind=lambda setting: {"T_max": setting.total_steps},
    ),
    Method(
        "LinearLR",
        "schedule",
        schedules.LinearLR,
        bind=lambda setting: {"start_factor": 1.0, "end_factor": 0.0, "total_iters": setting.total_steps},
    ),
    Method(
        "OneCycleLR",
        "schedule",
        schedules.OneCycleLR,
        {"pct_start": Uniform(0.05, 0.5)},
        # The momentum stays: not every optimizer has one, and a schedule of this slot moves the learning rate alone.
        bind=lambda setting: {
            "max_lr": initial_rates(setting.optimizer),
            "total_steps": setting.total_steps,
            "cycle_momentum": False,
        },
    ),
)

BATCH_TRANSFORMS = (
    Method("NoTransform", "batch", NoTransform),
    Method(
        "Mixup",
        "batch",
        Mixup,
        {"alpha": LogUniform(0.1, 2.0)},
        bind=lambda setting: {"num_classes": setting.num_classes},
    ),
)

SAMPLERS = (
    Method(
        "RandomSampler",
        "sampler",
        RandomSampler,
        bind=lambda setting: {"num_samples": setting.num_samples},
    ),
)

LAYERS = (Method("NoSurgery", "layer", no_surgery),)
