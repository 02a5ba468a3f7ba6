"""GAQAT: sharpness-aware training with learned quantisers, whose scales stop hearing the task (arXiv:2412.05551).

Weights and activations are rounded with learned scales s (LSQ). Sharpness-aware gradient matching (SAGM) minimises
L(θ) + L(θ + ε̂ - α ∇L(θ)) with ε̂ = ρ ∇L / ‖∇L‖, over weights and scales alike: with

    g_task = ∇L(θ),    g_smooth = ∇L(θ + (ρ / ‖g_task‖ - α) g_task)

a step follows ½ (g_task + g_smooth). For a scale the two may oppose each other. How erratic its g_task is, its disorder
δ, is counted over K steps. Where that is below a threshold τ the scale follows ½ g_smooth alone for the next K steps;
then this is decided anew. Weights, biases and all else always follow both.

The paper defines disorder for two sequences and applies it to the task gradient; we count sign flips between successive
steps. `disorder="task_vs_smooth"` compares the signs of the two gradients instead. A zero is a sign of its own.

There is no reference code. SAGM is as in its authors' code, but that parameters come back bit for bit. Neither K nor τ
is known: 350 and 0.3 are our defaults, to be tuned. With signs by chance δ is about 0.5 ± 0.5 / √K. The factor ½ under
freezing, and first and last layer left in float, are our reading too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import evaluate
from fairtrial.methods.quantization.fake_quantization import replace_layers
from fairtrial.methods.quantization.ofq import LSQActivation
from fairtrial.methods.quantization.quantize import skipped
from fairtrial.methods.registry import method

MODES = "freeze_task", "freeze_smooth", "none"
DISORDERS = "flips", "task_vs_smooth"
OWN = (  # what a copy of the optimizer has beside what torch copies
    "base_optimizer",
    "task",
    "smooth",
    "scales",
    "rho",
    "alpha",
    "threshold",
    "mode",
    "disorder",
    "perturb_scales",
    "frozen",
    "_left",
)


# Layers ------------------------------------------------------------------------------------------------------------


class LSQQuantizer(LSQActivation):
    """`LSQActivation` whose step starts at 2 mean|x| / √Q_p, signed or not.

    Args:
        bits: from 1 to 16; the paper's 3 and 4.
        signed: whether there are levels below 0; None: if the first input has entries below 0.
        channels: how many steps are learned: one, or one for each channel.
        axis: of the channels.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(self, bits: int, signed: bool | None = True, *, channels: int = 1, axis: int = 0) -> None:
        super().__init__(bits, signed is not False, channels=channels, axis=axis)
        self.undecided = signed is None

    def get_extra_state(self) -> Any:
        return {"started": self.started, "signed": self.signed, "undecided": self.undecided}

    def set_extra_state(self, state: Any) -> None:
        self.started, self.undecided = state["started"], state["undecided"]
        self._allow(state["signed"])

    def _allow(self, signed: bool) -> None:
        fresh = LSQActivation(self.bits, signed)
        self.signed, self.lowest, self.highest = signed, fresh.lowest, fresh.highest

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if self.undecided:
            self._allow(bool((x < 0).any()))
        super()._start(x)
        self.undecided = self.undecided and not self.started
        if not self.signed:
            self.step.div_(2)


class LSQLayer(nn.Module):
    """A linear layer or a convolution with rounded weights and inputs.

    Args:
        layer: holds the weights; it becomes part of this one.
        weight_bits: of the weights, which are signed.
        act_bits: of the inputs.
        signed: whether inputs may be below 0; see `LSQQuantizer`.
        per_channel: learn a weight step for each output channel.

    Raises:
        ValueError: bits outside their range.
    """

    def __init__(
        self,
        layer: nn.Module,
        weight_bits: int = 4,
        act_bits: int = 4,
        *,
        signed: bool | None = None,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        weight: Tensor = layer.get_parameter("weight")
        self.layer = layer
        self.weight_quantizer = LSQQuantizer(weight_bits, channels=len(weight) if per_channel else 1)
        self.input_quantizer = LSQQuantizer(act_bits, signed)
        self.weight_quantizer.to(weight.device)._start(weight)  # now, so that an optimizer finds it as it will be
        self.input_quantizer.to(weight.device)

    def forward(self, x: Float[Tensor, "*b"]) -> Float[Tensor, "*c"]:
        weight = self.weight_quantizer(self.layer.weight)
        result: Tensor = torch.func.functional_call(self.layer, {"weight": weight}, (self.input_quantizer(x),))
        return result


def _quantisable(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Linear layers and convolutions that are not rounded yet, with all their names."""
    taken = {module.layer for module in model.modules() if isinstance(module, LSQLayer)}
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) and module not in taken:
            found.setdefault(module, []).append(name)
    return found


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """The names of the first and the last linear layer or convolution; nothing of a model with no others."""
    names = [name for name, *_ in _quantisable(model).values()]
    return (names[0], names[-1]) if len(names) > 2 else ()


@method(paper="gaqat", slot="layer", bind=lambda setting: {"skip": first_and_last(setting.model)})
def lsq_layers(
    model: nn.Module,
    weight_bits: int = 4,
    act_bits: int = 4,
    *,
    per_channel: bool = False,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Put an `LSQLayer` around every linear layer and convolution of a model, in place.

    Args:
        model: fresh or trained; convolutions are of one or two dimensions, and no subclasses.
        weight_bits, act_bits, per_channel: as in `LSQLayer`.
        skip: names of layers that are left alone, whole or their last part; `first_and_last(model)` is usual.

    Returns:
        The model, or the new layer if the model is itself one to be rounded.

    Raises:
        ValueError: there is nothing to round that has not been before, or bits outside their range.
    """
    found = _quantisable(model).items()
    places = [(name, layer) for layer, names in found if not any(skipped(n, skip) for n in names) for name in names]
    require(bool(places), "model", type(model).__name__, "one with an nn.Linear or a convolution that is not skipped")
    return replace_layers(model, places, lambda layer: LSQLayer(layer, weight_bits, act_bits, per_channel=per_channel))


def quantizers_of(model: nn.Module) -> list[LSQActivation]:
    """The quantisers with learned steps in a model, for `GAQAT`."""
    return [module for module in model.modules() if isinstance(module, LSQActivation)]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation uses a batch's statistics but does not remember them; for the second pass of a step."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


# Disorder ----------------------------------------------------------------------------------------------------------


def gradient_disorder(a: Shaped[Tensor, "k *s"], b: Shaped[Tensor, "k *s"] | None = None) -> Float[Tensor, ""]:
    """How often the signs of two sequences differ; of one sequence, how often those of neighbours do.

    Args:
        a: a gradient for each of k steps; entries count alike.
        b: another; without it `a` is compared with itself one step later.

    Raises:
        ValueError: fewer than two steps of one sequence, none of two, or NaN.
    """
    require(len(a) >= (2 if b is None else 1), "a", tuple(a.shape), "a sequence of at least two gradients")
    for name, x in (("a", a), ("b", b)):
        require(x is None or not x.isnan().any(), name, "NaN", "numbers")
    signs, others = (a[:-1].sign(), a[1:].sign()) if b is None else (a.sign(), b.sign())
    return (signs != others).float().mean()


class GradientDisorder:
    """The disorder of the last gradients of one scale, or of several.

    Args:
        window: how many are kept; at least 2.

    Attributes:
        signs: (window, n) of what has been seen, int8; the newest is at `seen - 1` modulo the window.
        seen: how many gradients there have been.
    """

    def __init__(self, window: int) -> None:
        require(window >= 2, "window", window, "at least 2")
        self.window, self.seen = window, 0
        self.signs: Tensor | None = None

    @torch.no_grad()
    def update(self, gradient: Float[Tensor, "*s"]) -> None:
        """Take the next gradient.

        Raises:
            ValueError: it has another number of entries than the ones before.
        """
        if self.signs is None:
            self.signs = torch.zeros(self.window, gradient.numel(), dtype=torch.int8, device=gradient.device)
        n = self.signs.shape[1]
        require(gradient.numel() == n, "gradient", tuple(gradient.shape), f"of {n} entries, as the ones before")
        self.signs[self.seen % self.window] = gradient.sign().flatten().to(torch.int8)
        self.seen += 1

    def latest(self) -> Shaped[Tensor, "k n"]:
        """The signs that are kept, oldest first."""
        require(self.signs is not None, "update", "never called", "called before")
        assert self.signs is not None
        if self.seen < self.window:
            return self.signs[: self.seen]
        return self.signs.roll(-(self.seen % self.window), 0)

    def each(self) -> Float[Tensor, " n"]:
        """The share of sign flips of every entry.

        Raises:
            ValueError: fewer than two gradients have been seen.
        """
        signs = self.latest()
        require(len(signs) >= 2, "update", f"called {len(signs)} times", "called at least twice before")
        return (signs[1:] != signs[:-1]).float().mean(0)

    def value(self) -> float:
        """The mean over entries; as `each` otherwise."""
        return self.each().mean().item()

    def state_dict(self) -> dict[str, Any]:
        return {"signs": None if self.signs is None else self.signs.clone(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        signs = state["signs"]
        length = self.window if signs is None else len(signs)
        require(length == self.window, "state_dict", f"a window of {length}", f"a window of {self.window}")
        self.signs, self.seen = None if signs is None else signs.clone(), state["seen"]


# Training ----------------------------------------------------------------------------------------------------------


class GAQAT(Optimizer):
    """Any optimizer along ½ (g_task + g_smooth), with one of the two dropped for scales of low disorder.

    `step(closure)` takes a function that clears the gradients, gives the loss and calls `backward`; it is called twice.
    Or call `first_step()` after the first backward pass and `second_step()` after the second, with gradients cleared in
    between; batch normalisation then need not see the second pass (`running_statistics_kept`). Gradients are those
    before any clipping. Learning-rate schedulers are given this optimizer.

    Args:
        params: parameters or parameter groups, real and dense, the quantisers' among them.
        base_optimizer: makes the optimizer that takes the steps, from `params` and `base_options`.
        quantizers: with a learned `step` each; see `quantizers_of`. Without any, or with mode 'none', this is SAGM.
        rho: ρ, at least 0; SAGM's 0.05.
        alpha: α, finite; SAGM's 0.001.
        window: K, at least 2.
        threshold: τ within [0, 1]; 0 freezes nothing.
        mode: what scales of low disorder lose, 'freeze_task' or 'freeze_smooth'; or 'none'.
        disorder: 'flips' of the task gradient, or 'task_vs_smooth', the share of signs that the two do not share.
        perturb_scales: whether scales move with the weights to where g_smooth is taken.
        base_options: arguments of the base optimizer.

    Attributes:
        frozen: for each quantiser, whether it loses a gradient at present.

    Raises:
        ValueError: an argument lies outside its range, a quantiser's step is not among the parameters, there is no
            closure, or a loaded state is not of this optimizer.
    """

    needs_closure = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        quantizers: Sequence[nn.Module] = (),
        rho: float | int = 0.05,
        alpha: float | int = 0.001,
        window: int = 350,
        threshold: float | int = 0.3,
        mode: str = "freeze_task",
        disorder: str = "flips",
        *,
        perturb_scales: bool = True,
        **base_options: Any,
    ) -> None:
        require(0 <= rho < math.inf, "rho", rho, "at least 0 and finite")
        require(-math.inf < alpha < math.inf, "alpha", alpha, "finite")
        require(0 <= threshold <= 1, "threshold", threshold, "within [0, 1]")
        require(mode in MODES, "mode", mode, ", ".join(map(repr, MODES)))
        require(disorder in DISORDERS, "disorder", disorder, ", ".join(map(repr, DISORDERS)))
        self.task, self.smooth = GradientDisorder(window), GradientDisorder(window)
        base = base_optimizer(params, **base_options)
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer = base
        base.param_groups, self.state = self.param_groups, base.state
        self.scales = [quantizer.get_parameter("step") for quantizer in quantizers]
        known = {p for group in self.param_groups for p in group["params"]}
        require(known.issuperset(self.scales), "quantizers", f"{len(self.scales)}", "with steps among the parameters")
        self.rho, self.alpha, self.threshold = rho, alpha, threshold
        self.mode, self.disorder, self.perturb_scales = mode, disorder, perturb_scales
        self.frozen: Bool[Tensor, " q"] = torch.zeros(len(self.scales), dtype=torch.bool)
        self._left: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "base_optimizer"):  # whose list of groups is this one's
            self.base_optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in OWN}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with windows and what is frozen; to be asked for between two steps."""
        own = {"task": self.task.state_dict(), "smooth": self.smooth.state_dict(), "frozen": self.frozen.clone()}
        return {**self.base_optimizer.state_dict(), "gaqat": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict of a GAQAT over the same base optimizer and as many quantisers."""
        own = state_dict.get("gaqat")
        require(own is not None, "state_dict", sorted(state_dict), "of GAQAT")
        assert own is not None
        require(
            len(own["frozen"]) == len(self.scales), "state_dict", own["frozen"], f"of {len(self.scales)} quantizers"
        )
        task, smooth = GradientDisorder(self.task.window), GradientDisorder(self.smooth.window)
        task.load_state_dict(own["task"])
        smooth.load_state_dict(own["smooth"])
        self.base_optimizer.load_state_dict({name: v for name, v in state_dict.items() if name != "gaqat"})
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.task, self.smooth, self.frozen = task, smooth, own["frozen"].clone()

    @_disable_dynamo
    @torch.no_grad()
    def first_step(self) -> None:
        """With g_task as gradients: move to where g_smooth is to be taken.

        Raises:
            ValueError: the last step has not been finished.
        """
        require(self._left is None, "first_step", "called twice", "followed by second_step")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        task = [p.grad.clone() for p in params if p.grad is not None]
        self._left = params, [p.detach().clone() for p in params], task
        kept = set() if self.perturb_scales else set(self.scales)
        moved = [(p, g) for p, g in zip(params, task, strict=True) if p not in kept]
        if moved:
            gradients = [g for _, g in moved]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            factor = self.rho / (norm + 1e-12) - self.alpha
            torch._foreach_add_([p for p, _ in moved], torch._foreach_mul(gradients, factor))

    @_disable_dynamo
    @torch.no_grad()
    def second_step(self) -> None:
        """With g_smooth as gradients: come back, and take the step.

        Raises:
            ValueError: `first_step` has not been called.
        """
        params, task = self._come_back()
        halves = {p: (g, torch.zeros_like(g) if p.grad is None else p.grad) for p, g in zip(params, task, strict=True)}
        frozen = self.frozen.tolist() if self.mode != "none" else [False] * len(self.scales)
        dropped = {scale for scale, is_frozen in zip(self.scales, frozen, strict=True) if is_frozen}
        for p, (g_task, g_smooth) in halves.items():
            if p not in dropped:
                p.grad = (g_task + g_smooth) / 2
            else:
                p.grad = (g_smooth if self.mode == "freeze_task" else g_task) / 2
        if self.scales and self.mode != "none":
            self._watch(halves)
        self.base_optimizer.step()

    @torch.no_grad()
    def _come_back(self) -> tuple[list[Tensor], list[Tensor]]:
        require(self._left is not None, "second_step", "called first", "called after first_step")
        assert self._left is not None
        params, before, task = self._left
        if params:
            torch._foreach_copy_(params, before)
        self._left = None
        return params, task

    def _watch(self, halves: dict[Tensor, tuple[Tensor, Tensor]]) -> None:
        """Remember the scales' gradients, and every K steps decide anew what is frozen."""
        pairs = [halves.get(scale, (torch.zeros_like(scale),) * 2) for scale in self.scales]
        self.task.update(torch.cat([task.flatten() for task, _ in pairs]))
        self.smooth.update(torch.cat([smooth.flatten() for _, smooth in pairs]))
        if self.task.seen % self.task.window == 0:
            if self.disorder == "flips":
                found = self.task.each()
            else:
                found = (self.task.latest() != self.smooth.latest()).float().mean(0)
            means = torch.stack([part.mean() for part in found.split([s.numel() for s in self.scales])])
            self.frozen = (means < self.threshold).cpu()

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and return the loss at θ."""
        if closure is None:
            raise ValueError("closure must be a function that gives the loss and calls backward, got None")
        loss = evaluate(closure)
        self.first_step()
        try:
            evaluate(closure)
        except BaseException:
            self._come_back()
            raise
        self.second_step()
        return loss
