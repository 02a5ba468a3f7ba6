"""Models with quantised layers in safetensors files, as small as the arithmetic says.

A file says what each quantised layer is, and loads into a model of the same architecture that is not quantised.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.quantization.packing import PackedLinear, packed_layers, quantised_layers
from fairtrial.methods.quantization.quantize import put_in_place_of

Read = Callable[[str], Tensor | None]  # one of a layer's tensors, by its name there; None if the file has none


@dataclass(frozen=True)
class FileFormat:
    """A kind of file.

    Attributes:
        name: in the file.
        version: of the layout.
        what: a file of the kind is, as messages say it.
        layout: what has the version, as messages say it.
        empty: makes a layer to be loaded, from the float one, what the file says of it, and its tensors.
    """

    name: str
    version: int
    what: str
    layout: str
    empty: Callable[[nn.Linear, Mapping[str, Any], Read], nn.Module]

    def save(self, model: nn.Module, path: str | Path, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a model into a file, with what each quantised layer is."""
        from safetensors.torch import save_model

        about = {"format": self.name, "version": str(self.version), "layers": json.dumps(layers)}
        save_model(model, str(path), metadata=about)

    def load_(self, model: nn.Module, path: str | Path) -> nn.Module:
        """Load a file into a model that is not quantised, in place; returns the model.

        Raises:
            ValueError: the file is of another kind or version, or its layers do not fit the model's, which is left as
                it was.
        """
        from safetensors import safe_open
        from safetensors.torch import load_model

        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != self.name:
                raise ValueError(f"{path} is no {self.what}")
            if about.get("version") != str(self.version):
                raise ValueError(
                    f"{path} has version {about.get('version')} of {self.layout}, this library {self.version}"
                )
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

            def tensor(name: str, part: str) -> Tensor | None:
                return file.get_tensor(f"{name}.{part}") if f"{name}.{part}" in shapes else None

            made = {
                name: self.empty(_linear(model, name, path), held, partial(tensor, name))
                for name, held in json.loads(about["layers"]).items()
            }
        own = {f"{name}.{part}": buffer for name, layer in made.items() for part, buffer in layer.named_buffers()}
        linears = {name: model.get_submodule(name) for name in made}
        replaced = [n for n, m in model.named_modules(remove_duplicate=False) if m in linears.values()]
        rest = {n: t for n, t in model.state_dict().items() if not any(n.startswith(f"{name}.") for name in replaced)}
        there = {t.data_ptr() for n, t in rest.items() if n in shapes}  # a file has shared tensors once
        for name in shapes:
            if name not in own and name not in rest:
                raise ValueError(f"{path} has {name}, which the model has not")
        for name, held in (own | rest).items():
            if name not in shapes and (name in own or held.data_ptr() not in there):
                raise ValueError(f"{path} lacks {name}, which the model has")
            if name in shapes and shapes[name] != tuple(held.shape):
                raise ValueError(f"{name} has shape {shapes[name]} in {path}, the model needs {tuple(held.shape)}")
        for name, layer in made.items():
            put_in_place_of(model, linears[name], layer)
        load_model(model, str(path))
        return model


def _linear(model: nn.Module, name: str, path: str | Path) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path} has a layer {name}, which the model has not") from None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is a {type(layer).__name__} in the model, {path} has a linear layer")
    return layer


# Packed layers -----------------------------------------------------------------------------------------------------


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write a model with packed layers into a file, with what each of them is.

    Raises:
        ValueError: the model has no packed layer, is one itself, or has other quantised layers, too.
    """
    layers = {
        name: {"bits": layer.bits, "groups": layer.groups, "kept": None if layer.kept is None else len(layer.kept)}
        for name, layer in packed_layers(model)
    }
    if not layers:
        raise ValueError("the model has no packed layer: quantise it first, and save it before for_inference_")
    require("" not in layers, "model", type(model).__name__, "a model that has packed layers, not one itself")
    for name, layer in quantised_layers(model):
        if not isinstance(layer, PackedLinear):
            raise ValueError(f"{name} is a {type(layer).__name__}, which packed files do not hold: save it before")
    PACKED.save(model, path, layers)


def load_packed_(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a packed file into a model of the same architecture that is not quantised, in place; returns the model.

    Raises:
        ValueError: the file is of another format or version, or its layers do not fit the model's, which is left as it
            was.
    """
    return PACKED.load_(model, path)


def _empty(layer: nn.Linear, held: Mapping[str, Any], read: Read) -> PackedLinear:
    def dtype_of(part: str) -> torch.dtype:
        found = read(part)
        return torch.float16 if found is None else found.dtype

    codes = torch.zeros(layer.out_features, layer.in_features, dtype=torch.uint8)
    scale, offset = (
        torch.zeros(layer.out_features, held["groups"], dtype=dtype_of(part)) for part in ("scale", "offset")
    )
    kept, values = held["kept"], None
    if kept is not None:
        values = torch.zeros(kept, dtype=torch.int32), torch.zeros(kept, dtype=dtype_of("kept"))
    return PackedLinear(codes, scale, offset, held["bits"], layer.bias, kept=values)


PACKED = FileFormat("fairtrial-packed", 1, "packed model of fairtrial's", "the packed format", _empty)
