"""Packed models in safetensors files, as small as the arithmetic says; they load into a model that is not quantised."""

import json
from pathlib import Path

import torch
from torch import nn

from fairtrial.methods.quantization.packing import PackedLinear, packed_layers

FORMAT, VERSION = "fairtrial-packed", 1


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write a model with packed layers into a file, with what each of them is.

    Raises:
        ValueError: the model has no packed layer.
    """
    from safetensors.torch import save_model

    layers = {
        name: {"bits": layer.bits, "groups": layer.groups, "kept": None if layer.kept is None else len(layer.kept)}
        for name, layer in packed_layers(model)
    }
    if not layers:
        raise ValueError("the model has no packed layer: quantise it first, and save it before for_inference_")
    about = {"format": FORMAT, "version": str(VERSION), "layers": json.dumps(layers)}
    save_model(model, str(path), metadata=about)


def load_packed_(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a packed file into a model of the same architecture that is not quantised, in place; returns the model.

    Raises:
        ValueError: the file is of another format or version, or its layers do not fit the model's, which is left as it
            was.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    with safe_open(str(path), "pt") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} is no packed model of fairtrial's")
        if about.get("version") != str(VERSION):
            raise ValueError(f"{path} has version {about.get('version')} of the packed format, this library {VERSION}")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        dtypes = {name: file.get_tensor(name).dtype for name in shapes if name.endswith((".scale", ".kept"))}
    layers = json.loads(about["layers"])
    empty = {}
    for name, held in layers.items():
        layer = _linear(model, name, path)
        empty[name] = made = _empty(layer, held["bits"], held["groups"], held["kept"], name, dtypes)
        for part, tensor in made.named_buffers():
            if shapes.get(f"{name}.{part}") != tuple(tensor.shape):
                found = shapes.get(f"{name}.{part}")
                raise ValueError(f"{name}.{part} has shape {found} in {path}, the model needs {tuple(tensor.shape)}")
    for name, tensor in model.state_dict().items():
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if not inside and name in shapes and shapes[name] != tuple(tensor.shape):
            raise ValueError(f"{name} has shape {shapes[name]} in {path}, the model needs {tuple(tensor.shape)}")
    for name, made in empty.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    load_model(model, str(path))
    return model


def _linear(model: nn.Module, name: str, path: str | Path) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path} has a layer {name}, which the model has not") from None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is a {type(layer).__name__} in the model and cannot take packed weights")
    return layer


def _empty(
    layer: nn.Linear, bits: int, groups: int, kept: int | None, name: str, dtypes: dict[str, torch.dtype]
) -> PackedLinear:
    codes = torch.zeros(layer.out_features, layer.in_features, dtype=torch.uint8)
    scale = torch.zeros(layer.out_features, groups, dtype=dtypes.get(f"{name}.scale", torch.float16))
    values = None
    if kept is not None:
        values = (
            torch.zeros(kept, dtype=torch.int32),
            torch.zeros(kept, dtype=dtypes.get(f"{name}.kept", torch.float16)),
        )
    return PackedLinear(codes, scale, scale.clone(), bits, layer.bias, kept=values)
