"""Optimizers that others keep well, offered in the optimizer slot like those of this library.

The comparisons of `fantastic_optimizers` and `learning_rate_free` are of these. PyTorch has two of them; the others
come with `pip install 'fairtrial[optimizers]'` and are imported when they are asked for. Every function here returns
the optimizer of its package, with the package's defaults for what is not given; it takes what people tune, and for the
rest there is the package.

Of those comparisons' optimizers some are missing, because parameters and gradients are not all that they need: Sophia
takes second derivatives, Adam-mini goes by the names of the model's parts, MoMo wants the loss of the step.
"""

import importlib
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.registry import LogUniform, method


def of_package(package: str, name: str) -> Any:
    """The optimizer class of that name.

    Raises:
        ImportError: the package is not installed, or too old to have it.
    """
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        message = f"{name} needs the package {package}: pip install 'fairtrial[optimizers]' ({error})"
        raise ImportError(message) from error


def muon_param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters as groups for `Muon`: its own are the hidden matrices.

    Those are all matrices but embeddings and the last linear layer, as the makers of Muon recommend.
    """
    apart = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    apart.update(linear[-1:])
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.ndim == 2 and p not in apart]
    chosen = set(hidden)
    others = [p for p in trained if p not in chosen]
    return [{"params": params, "muon": muon} for params, muon in ((hidden, True), (others, False)) if params]


Betas = tuple[float, float]


@method(paper="fantastic_optimizers", slot="optimizer", search={"lr": LogUniform(1e-4, 1e-1)})
def NAdamW(  # noqa: N802
    params: ParamsT, lr: float = 2e-3, betas: Betas = (0.9, 0.999), weight_decay: float = 0.01
) -> Optimizer:
    """`torch.optim.NAdam` with decoupled weight decay, by default as much as torch's AdamW has."""
    return torch.optim.NAdam(params, lr, betas, weight_decay=weight_decay, decoupled_weight_decay=True)


@method(
    paper="fantastic_optimizers",
    slot="optimizer",
    search={"lr": LogUniform(1e-4, 1e-1)},
    bind=lambda setting: {"params": muon_param_groups(setting.model)},
)
class Muon(Optimizer):
    """`torch.optim.Muon` on the groups with `muon=True`, which are of matrices, and `torch.optim.AdamW` on the others.

    One learning rate serves both, because the orthogonal update is scaled to the size that AdamW's has
    (`adjust_lr_fn="match_rms_adamw"` of torch).

    Args:
        params: parameter groups; `muon_param_groups` makes them.
        lr: learning rate, at least 0.
        weight_decay: decoupled decay of both, at least 0; torch's default for Muon is 0.1.
        momentum: of the orthogonal update, at least 0.
        betas: decay rates of AdamW's moments, each within [0, 1).

    Raises:
        ValueError: an argument lies outside its range, or a tensor of a Muon group is no matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._parts: dict[bool, Optimizer] = {}
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "muon": False}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        added = self.param_groups.pop()
        muon = added["muon"]
        keys = ("params", "lr", "weight_decay", "momentum" if muon else "betas")
        given = [{key: added[key] for key in keys}]
        if muon not in self._parts:
            make: Any = torch.optim.Muon if muon else torch.optim.AdamW
            self._parts[muon] = make(given, **({"adjust_lr_fn": "match_rms_adamw"} if muon else {}))
        else:
            self._parts[muon].add_param_group(given[0])
        # the part's own group, so that a schedule that changes it here changes it there
        self.param_groups.append(self._parts[muon].param_groups[-1])
        self.param_groups[-1]["muon"] = muon
        self._share()

    def _share(self) -> None:
        for muon, part in self._parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters; returns the loss of `closure`, which is called once, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss


@method(paper="fantastic_optimizers", slot="optimizer", search={"lr": LogUniform(1e-4, 1e-1)})
def SOAP(  # noqa: N802
    params: ParamsT, lr: float = 3e-3, betas: Betas = (0.95, 0.95), weight_decay: float = 0.01
) -> Optimizer:
    """`pytorch_optimizer.SOAP`: Adam in the eigenbasis of Shampoo's preconditioner."""
    make = of_package("pytorch_optimizer", "SOAP")
    return make(params, lr=lr, betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


@method(paper="fantastic_optimizers", slot="optimizer", search={"lr": LogUniform(1e-4, 1e-1)})
def Kron(  # noqa: N802
    params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0
) -> Optimizer:
    """`pytorch_optimizer.Kron`: PSGD with Kronecker factors."""
    of_package("opt_einsum", "contract")  # torch's products of four tensors take the worst order without it
    make = of_package("pytorch_optimizer", "Kron")
    return make(params, lr=lr, weight_decay=weight_decay)  # type: ignore[no-any-return]


@method(paper="fantastic_optimizers", slot="optimizer", search={"lr": LogUniform(1e-4, 1e-1)})
def MARS(  # noqa: N802
    params: ParamsT, lr: float = 3e-3, betas: Betas = (0.95, 0.99), weight_decay: float = 0.0
) -> Optimizer:
    """`pytorch_optimizer.MARS`: AdamW on gradients of less variance; tensors of one dimension have the same rate."""
    make = of_package("pytorch_optimizer", "MARS")
    return make(params, lr=lr, betas=betas, weight_decay=weight_decay, lr_1d=lr)  # type: ignore[no-any-return]


@method(paper="fantastic_optimizers", slot="optimizer", search={"lr": LogUniform(1e-5, 1e-2)})
def Lion(  # noqa: N802
    params: ParamsT, lr: float = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: float = 0.0
) -> Optimizer:
    """`pytorch_optimizer.Lion`: the sign of an interpolated momentum."""
    make = of_package("pytorch_optimizer", "Lion")
    return make(params, lr=lr, betas=betas, weight_decay=weight_decay)  # type: ignore[no-any-return]


@method(paper="fantastic_optimizers", slot="optimizer", search={"lr": LogUniform(1e-3, 1.0)})
def SCION(  # noqa: N802
    params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.0
) -> Optimizer:
    """`pytorch_optimizer.SCION`: steps of steepest descent in a norm that suits each tensor."""
    make = of_package("pytorch_optimizer", "SCION")
    return make(params, lr=lr, weight_decay=weight_decay)  # type: ignore[no-any-return]


@method(paper="learning_rate_free", slot="optimizer")
def DAdaptAdam(  # noqa: N802
    params: ParamsT, lr: float = 1.0, betas: Betas = (0.9, 0.999), weight_decay: float = 0.0
) -> Optimizer:
    """`dadaptation.DAdaptAdam` with decoupled weight decay; `lr` multiplies the rate that it finds."""
    make = of_package("dadaptation", "DAdaptAdam")
    with redirect_stdout(None):  # it says on standard output that its decay is decoupled
        return make(params, lr=lr, betas=betas, weight_decay=weight_decay, decouple=True)  # type: ignore[no-any-return]


@method(
    paper="learning_rate_free",
    slot="optimizer",
    search={"lr": LogUniform(1e-4, 1e-1)},
    bind=lambda setting: {"model": setting.model},
)
def AdamWScheduleFree(  # noqa: N802
    params: ParamsT,
    lr: float = 2.5e-3,
    betas: Betas = (0.9, 0.999),
    weight_decay: float = 0.0,
    *,
    model: nn.Module | None = None,
) -> Optimizer:
    """`schedulefree.AdamWScheduleFree`; it takes the place of a schedule, so leave the rate constant beside it.

    Given a model, it goes into training or evaluation mode whenever the model is called in that mode; without one,
    `optimizer.train()` and `optimizer.eval()` are to be called.
    """
    make = of_package("schedulefree", "AdamWScheduleFree")
    optimizer: Any = make(params, lr=lr, betas=betas, weight_decay=weight_decay)
    if model is not None:
        model.register_forward_pre_hook(
            lambda module, inputs: optimizer.train() if module.training else optimizer.eval()
        )
    return optimizer  # type: ignore[no-any-return]
