"""Quantise a model in place, one layer after the other, as `torchao.quantize_` does, with calibration data.

A configuration says how a layer is quantised: an object with `quantize(name, layer, found)`, which returns the layer
that takes its place, and with what it wants to know of the layer's inputs in `wants`. Where a model is a chain of
blocks, as transformers are, calibration data flow through it block by block: a layer sees the inputs that the quantised
blocks before it give, and no more than one block's statistics are held at once. Other models are run once per layer.
"""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.packing import (
    CPUInt4Linear,
    CPUInt8Linear,
    PackedLinear,
    group_size,
    packed_layers,
    quantised_layers,
)

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Want = Literal["hessian", "inputs", "float inputs"]


@dataclass
class Found:
    """What calibration found out about a layer.

    Attributes:
        hessian: mean of x xᵀ over the rows x of the layer's input, in float64, if wanted.
        inputs: those rows, if wanted.
        float_inputs: the rows at the same places in the model that nothing is quantised in, if wanted.
        prepared: what the configuration's `prepare` returned for this layer.
    """

    hessian: Float[Tensor, "i i"] | None = None
    inputs: Float[Tensor, "n i"] | None = None
    float_inputs: Float[Tensor, "n i"] | None = None
    prepared: Any = None


@runtime_checkable
class Config(Protocol):
    """How layers are quantised. It may also have `prepare(model, calibration)`, which is asked first, with the whole
    model as it was, and returns what each layer's `found.prepared` is to be, by name; and
    `finish(block, inputs, targets)`, asked after every quantised block of a chain, with a list of calls (args, kwargs)
    and the outputs of the block as it was.
    """

    wants: frozenset[Want]

    def quantize(self, name: str, layer: nn.Linear, found: Found) -> nn.Module: ...


def quantize_(
    model: nn.Module,
    config: Any,
    calibration: Iterable[Batch] = (),
    *,
    skip: Sequence[str] = ("lm_head",),
    progress: Callable[[str], None] = lambda name: None,
) -> nn.Module:
    """Quantise the linear layers of a model in place; returns the model.

    Of a model that is a layer itself it returns the new layer. A layer in several places has the new one in all, unless
    one is skipped. The output projection of `nn.MultiheadAttention` is left alone: its weights are read without a call.

    Args:
        model: any module with `nn.Linear`s; it is put into evaluation mode.
        config: how, such as `RoundToNearest(bits=4)`.
        calibration: batches to run the model on: tensors, mappings of keyword arguments, or sequences of arguments.
        skip: names of layers that are left alone, whole or their last part.
        progress: told the name of every layer that is done.

    Raises:
        ValueError: there is nothing to quantise, the model has been quantised before, a layer shares its weights or has
            some that are not finite, calibration data are missing, not finite or never reach a layer, or the
            configuration refuses a layer. The model is as it was then, as it is after any other exception.
    """
    given = isinstance(config, Config) and not isinstance(config, type)
    require(given, "config", config, "a configuration such as RoundToNearest(bits=4)")
    several = not isinstance(calibration, Tensor | Mapping)
    require(several, "calibration", f"a single {type(calibration).__name__}", "batches, such as a list of them")
    layers = linear_layers(model, skip)
    names = [*layers]
    done = next(quantised_layers(model), None)
    if done is not None:
        raise ValueError(f"the model has been quantised already: {done[0]} is a {type(done[1]).__name__}")
    if not names:
        raise ValueError("the model has no linear layer to quantise" + (f" but {', '.join(skip)}" if skip else ""))
    check_unshared_weights(model, layers)
    check_finite_weights(layers)
    batches = list(calibration)
    check_finite_batches(batches)
    check: Callable[[str, nn.Module], None] | None = getattr(config, "check", None)
    if check is not None:
        for name in names:
            check(name, model.get_submodule(name))
    prepare = getattr(config, "prepare", None)
    if (config.wants or prepare is not None) and not batches:
        raise ValueError(f"{type(config).__name__} needs calibration data, got none")
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            for attribute in _fast_path(module):
                undo.callback(setattr, module, attribute, getattr(module, attribute))
        model.eval()
        prepared = prepare(model, batches, names) if prepare is not None else {}

        def replace(name: str, found: Found) -> None:
            nonlocal model
            found.prepared = prepared.get(name)
            layer = model.get_submodule(name)
            new = config.quantize(name, layer, found)
            undo.callback(put_in_place_of, model, new, layer)
            model = put_in_place_of(model, layer, new)
            progress(name)

        def finish(block: nn.Module, calls: Sequence[Call], targets: Sequence[Tensor]) -> None:
            for tensor in block.parameters():
                undo.callback(tensor.detach().copy_, tensor.detach().clone())
            config.finish(block, calls, targets)

        finishes = hasattr(config, "finish")
        chain = recorded_chain(model, batches) if config.wants or finishes else None
        if not config.wants and not finishes:
            for name in names:
                replace(name, Found())
        elif chain is not None:
            _through_chain(model, chain, config.wants, batches, names, replace, finish if finishes else None)
        else:
            _layer_by_layer(model, config, batches, names, replace)
        undo.pop_all()
    return model


def linear_layers(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that can be replaced, each by the first of its names; none of which a name is to be skipped."""
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
            names.setdefault(module, []).append(name)
    return {each[0]: layer for layer, each in names.items() if not any(skipped(name, skip) for name in each)}


def put_in_place_of(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put a module wherever another is in a model; returns the model, or the new module if the other is the model."""
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    return put_in_places(model, dict.fromkeys(places, new))


def put_in_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules in the places of others, by name; returns the model, or the new module if its place is the model's.

    PyTorch's transformer encoders read the weights of their layers in evaluation and do not call them; where one of
    these is replaced, that is switched off.
    """
    replaced = {model.get_submodule(name) for name in layers}
    for module in model.modules():
        for attribute, off in _fast_path(module).items():
            if not replaced.isdisjoint(module.modules()):
                setattr(module, attribute, off)
    for name, layer in layers.items():
        if not name:
            return layer
        model.set_submodule(name, layer)
    return model


def _fast_path(module: nn.Module) -> dict[str, Any]:
    """What switches off that a module reads its layers' weights instead of calling them."""
    if isinstance(module, nn.TransformerEncoder):
        return {"use_nested_tensor": False}
    return {"activation_relu_or_gelu": 0} if isinstance(module, nn.TransformerEncoderLayer) else {}


def skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a layer is left alone: its name, or the last part of it, is among those to skip."""
    return any(name == each or name.endswith(f".{each}") for each in skip)


def check_unshared_weights(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse layers of a model, by name, whose weights another module has too."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, layer in layers.items():
        if owners[id(layer.weight)] > 1:
            raise ValueError(f"{name} shares its weights with another module, which quantising would part: skip it")


def check_finite_weights(layers: Mapping[str, Any]) -> None:
    """Refuse layers with weights that are not finite, by name."""
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            raise ValueError(f"the weights of {name or 'the layer'} are not finite")


def check_finite_batches(batches: Sequence[Batch]) -> None:
    """Refuse calibration data that are not finite."""
    for number, batch in enumerate(batches):
        tensors = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                raise ValueError(f"batch {number} of the calibration data has values that are not finite")


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch of calibration data."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


@contextmanager
def watching(layers: Mapping[str, nn.Module], tell: Callable[[str, Tensor, Any], None]) -> Iterator[None]:
    """Within, `tell(name, input, output)` hears of every call of the layers."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(
                lambda module, args, kwargs, output, name=name: tell(name, (*args, *kwargs.values())[0], output),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield


# Statistics --------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Gathers what is wanted of the inputs of layers, as it is told of their calls."""

    wants: frozenset[Want]
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def see(self, name: str, x: Tensor, output: Any) -> None:
        """Take account of a call."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if "hessian" in self.wants:
            wide = rows.double()
            self.sums[name] = self.sums.get(name, 0) + wide.t() @ wide
        if self.wants & {"inputs", "float inputs"}:
            self.rows.setdefault(name, []).append(rows)
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def found(self, name: str) -> Found:
        if not self.counts.get(name):
            raise ValueError(f"the calibration data never reach the layer {name}")
        hessian = self.sums.pop(name) / self.counts[name] if name in self.sums else None
        inputs = torch.cat(self.rows.pop(name)) if name in self.rows else None
        if (hessian is not None and not hessian.isfinite().all()) or (
            inputs is not None and not inputs.isfinite().all()
        ):
            raise ValueError(f"the inputs of the layer {name} are not finite on the calibration data")
        return Found(hessian, inputs)


def watched(model: nn.Module, names: Sequence[str], wants: frozenset[Want], batches: Sequence[Batch]) -> Watch:
    """What is wanted of the named layers, gathered while the model runs on the batches."""
    watch = Watch(wants)
    with watching({name: model.get_submodule(name) for name in names}, watch.see):
        for batch in batches:
            run(model, batch)
    return watch


def _layer_by_layer(
    model: nn.Module,
    config: Config,
    batches: Sequence[Batch],
    names: Sequence[str],
    replace: Callable[[str, Found], None],
) -> None:
    floats = _float_inputs(model, names, batches) if "float inputs" in config.wants else {}
    for name in _in_order(model, batches[0], names):
        found = watched(model, [name], config.wants, batches).found(name)
        found.float_inputs = floats.pop(name, None)
        replace(name, found)


def _float_inputs(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The rows that layers see before anything is quantised."""
    rows = watched(model, names, frozenset({"inputs"}), batches).rows
    return {name: torch.cat(of_layer) for name, of_layer in rows.items()}


def _in_order(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[str]:
    """The layers as a run calls them."""
    called: dict[str, None] = {}
    with watching({name: model.get_submodule(name) for name in names}, lambda name, x, y: called.setdefault(name)):
        run(model, batch)
    missing = [name for name in names if name not in called]
    if missing:
        raise ValueError(f"the calibration data never reach the layer {missing[0]}")
    return list(called)


# Chains of blocks --------------------------------------------------------------------------------------------------

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Chain:
    """Blocks of which each takes what the one before it gives.

    Attributes:
        prefix: the name of their list.
        blocks: the list.
        inputs: what the first block takes, for each batch.
        others: for each batch, what each block is called with beside that.
    """

    prefix: str
    blocks: nn.ModuleList
    inputs: list[Tensor]
    others: list[list[Call]]

    def calls(self, place: int, inputs: Sequence[Tensor]) -> list[Call]:
        """The calls of a block on these inputs, one for each batch."""
        others = [of_batch[place] for of_batch in self.others]
        return [((x, *args), kwargs) for x, (args, kwargs) in zip(inputs, others, strict=True)]


class _NoChain(Exception):
    """A block is not called as a part of a chain."""


def chain_of_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a model's equal blocks, which may be a chain.

    None if there is no list of at least two blocks of one class, with linear layers; else the first of the longest.
    """
    found: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1:
            block = module[0]
            whole = not isinstance(block, nn.Linear) and any(isinstance(m, nn.Linear) for m in block.modules())
            if whole and (found is None or len(module) > len(found[1])):
                found = name, module
    return found


def recorded_chain(model: nn.Module, batches: Sequence[Batch]) -> Chain | None:
    """The model's chain of blocks, and how it is called on the batches; None if it has no chain.

    On every batch each block must be called once, with what the one before it gave as first argument, and with nothing
    else that an earlier one gave.
    """
    found = chain_of_blocks(model)
    if found is None:
        return None
    chain = Chain(*found, [], [])
    try:
        for batch in batches:
            first, others = _calls_along(model, chain.blocks, batch)
            chain.inputs.append(first)
            chain.others.append(others)
    except _NoChain:
        return None
    return chain


def _calls_along(model: nn.Module, blocks: nn.ModuleList, batch: Batch) -> tuple[Tensor, list[Call]]:
    """What the first block takes, and what each is called with beside its input."""
    calls: list[Call] = []
    first = last = torch.empty(0)
    version: int | None = None
    given: list[weakref.ref[Tensor]] = []  # all that blocks gave, without keeping it

    def before(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal first
        if place != len(calls) or not args or not isinstance(args[0], Tensor):
            raise _NoChain
        others = args[1:], kwargs
        if place == 0:
            first = args[0]
        elif args[0] is not last or _version(last) != version:
            raise _NoChain
        if any(tensor is ref() for tensor in _tensors(others) for ref in given):
            raise _NoChain
        calls.append(others)

    def after(output: Any) -> None:
        nonlocal last, version
        main = _main(output)
        if not isinstance(main, Tensor):
            raise _NoChain
        last, version = main, _version(main)
        given.extend(weakref.ref(tensor) for tensor in _tensors(output))

    with ExitStack() as stack:
        for place, block in enumerate(blocks):
            handles = (
                block.register_forward_pre_hook(
                    lambda module, args, kwargs, place=place: before(place, args, kwargs), with_kwargs=True
                ),
                block.register_forward_hook(lambda module, args, output: after(output)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        run(model, _without_cache(model, batch))
    if len(calls) != len(blocks):
        raise _NoChain
    return first, calls


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, where PyTorch counts it."""
    return None if tensor.is_inference() else tensor._version


def _tensors(given: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping | tuple | list):
        for each in given.values() if isinstance(given, Mapping) else given:
            yield from _tensors(each)


def _through_chain(
    model: nn.Module,
    chain: Chain,
    wants: frozenset[Want],
    batches: Sequence[Batch],
    names: Sequence[str],
    replace: Callable[[str, Found], None],
    finish: Callable[[nn.Module, Sequence[Call], Sequence[Tensor]], None] | None,
) -> None:
    outside = [name for name in names if not name.startswith(f"{chain.prefix}.")]
    outside_floats = _float_inputs(model, outside, batches) if "float inputs" in wants and outside else {}
    inputs, chain.inputs = chain.inputs, []
    floats = inputs if "float inputs" in wants else None
    for place, block in enumerate(chain.blocks):
        inside = {n: model.get_submodule(n) for n in names if n.startswith(f"{chain.prefix}.{place}.")}
        calls = chain.calls(place, inputs)
        watch = Watch(wants)
        with watching(inside, watch.see):
            targets = [_output(block, call) for call in (calls if floats is None else chain.calls(place, floats))]
        seen_by_float = dict(watch.rows) if floats is not None else {}
        if floats is not None:
            watch = Watch(wants)
            with watching(inside, watch.see):
                for call in calls:
                    _output(block, call)
        for name in inside:
            found = watch.found(name)
            if floats is not None:
                found.float_inputs = torch.cat(seen_by_float.pop(name))
            replace(name, found)
        if finish is not None and inside:
            finish(block, calls, targets)
        if floats is not None:
            floats = targets
        inputs = [_output(block, call) for call in calls]
    for name in outside:  # with all of the chain quantised
        found = watched(model, [name], wants, batches).found(name)
        found.float_inputs = outside_floats.pop(name, None)
        replace(name, found)


def _without_cache(model: nn.Module, batch: Batch) -> Batch:
    """The batch for a model of transformers, told not to keep keys and values."""
    parameters = inspect.signature(model.forward)
    if "use_cache" not in parameters.parameters:
        return batch
    no: Any = {"use_cache": False}
    if isinstance(batch, Tensor):
        return {"input_ids": batch, **no}
    return {**(batch if isinstance(batch, Mapping) else parameters.bind_partial(*batch).arguments), **no}


@torch.no_grad()
def _output(block: nn.Module, call: Call) -> Tensor:
    args, kwargs = call
    output: Tensor = _main(block(*args, **kwargs))
    return output


def _main(output: Any) -> Any:
    """The first of what a block gives, which the next one takes."""
    return output[0] if isinstance(output, tuple) else output


# Round to nearest --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels for groups of weights: level = scale · code + offset.

    Attributes:
        scale: the distance of neighbours.
        offset: the level of code 0.
    """

    scale: Float[Tensor, "o g"]
    offset: Float[Tensor, "o g"]

    def held_in(self, dtype: torch.dtype) -> "Grid":
        """The grid that is left when scale and offset are stored in another dtype; in the dtype that it had.

        A scale too near to 0 for the other dtype becomes the least that it has, for codes are found by dividing by it.

        Raises:
            ValueError: a scale or offset is too large for the other dtype.
        """
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scale = torch.where(self.scale.abs() < least, torch.copysign(torch.tensor(least), self.scale), self.scale)
        held = Grid(scale.to(dtype).to(self.scale.dtype), self.offset.to(dtype).to(self.offset.dtype))
        if not (held.scale.isfinite().all() and held.offset.isfinite().all()):
            largest = max(scale.abs().max().item(), self.offset.abs().max().item())
            require(False, "scale_dtype", dtype, f"one that holds scales and offsets of up to {largest:.3g}")
        return held


def fit_range(grouped: Float[Tensor, "o g s"], bits: int, *, symmetric: bool = False) -> Grid:
    """The grid from the least to the largest weight of each group, with 0 on it.

    Asymmetric: scale = (max - min) / (2^b - 1), both taken with 0, and a whole zero point. Symmetric: the largest
    magnitude is 2^(b-1) - 1 steps from 0, which is code 2^(b-1). A group of zeros gets scale 1.
    """
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    if symmetric:
        scale = torch.maximum(-low, high) / max(1, 2 ** (bits - 1) - 1)
        scale = torch.where(scale > 0, scale, 1)
        return Grid(scale, -scale * 2 ** (bits - 1))
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1)
    return Grid(scale, scale * torch.round(low / scale))


def round_to(grouped: Float[Tensor, "o g s"], grid: Grid, bits: int) -> Float[Tensor, "o g s"]:
    """The nearest code of each weight, as floating-point numbers."""
    return ((grouped - grid.offset[..., None]) / grid.scale[..., None]).round_().clamp_(0, 2**bits - 1)


def for_inference_(model: nn.Module) -> nn.Module:
    """Put packed layers that PyTorch's CPU kernels take into their layouts, in place; the model can no longer be saved.

    They take 4 bits in groups of 32, 64, 128 or 256, and 8 bits with a scale for each row. Returns the model; of one
    that is a packed layer itself the new layer.
    """
    for _, layer in list(packed_layers(model)):
        for kind in (CPUInt4Linear, CPUInt8Linear):
            if kind.takes(layer):
                model = put_in_place_of(model, layer, kind(layer))
    return model


def average_bits(model: nn.Module) -> float:
    """Bits per weight over all quantised layers, everything counted that they hold beside biases."""
    layers: list[Any] = [layer for _, layer in quantised_layers(model)]
    require(bool(layers), "model", type(model).__name__, "a model with quantised layers")
    sizes = [layer.in_features * layer.out_features for layer in layers]
    held: float = sum(layer.bits_per_weight() * size for layer, size in zip(layers, sizes, strict=True))
    weights: int = sum(sizes)
    return held / weights


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what several modules share counts once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight goes to the nearest level between the least and the largest of its group; needs no data.

    Args:
        bits: of a code, from 1 to 8.
        group_size: weights along the input that share scale and offset; -1 for the whole row.
        symmetric: levels on both sides of 0 alike, without an offset of their own.
        scale_dtype: what scales and offsets are held in.

    Raises:
        ValueError: an argument lies outside its range; when quantising, the group size does not divide a layer.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16

    wants: ClassVar[frozenset[Want]] = frozenset()

    def __post_init__(self) -> None:
        check_rounding(self.bits, self.group_size)

    def check(self, name: str, layer: nn.Linear) -> None:
        check_groups(name, layer, self.group_size)

    @torch.no_grad()
    def quantize(self, name: str, layer: nn.Linear, found: Found) -> PackedLinear:
        size = group_size(layer.in_features, self.group_size)
        grouped = layer.weight.view(layer.out_features, -1, size)
        grid = fit_range(grouped, self.bits, symmetric=self.symmetric).held_in(self.scale_dtype)
        codes = round_to(grouped, grid, self.bits).to(torch.uint8).flatten(1)
        return PackedLinear(
            codes, grid.scale.to(self.scale_dtype), grid.offset.to(self.scale_dtype), self.bits, layer.bias
        )


def check_rounding(bits: int, group_size: int) -> None:
    """Refuse numbers of bits and sizes of groups that no layer could have."""
    require(type(bits) is int and 1 <= bits <= 8, "bits", bits, "a whole number from 1 to 8")
    accepted = type(group_size) is int and (group_size == -1 or group_size >= 1)
    require(accepted, "group_size", group_size, "-1 or a whole number of at least 1")


def check_groups(name: str, layer: nn.Linear, asked: int) -> None:
    """Refuse a group size that does not divide a layer's input, with the layer's name."""
    try:
        group_size(layer.in_features, asked)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
