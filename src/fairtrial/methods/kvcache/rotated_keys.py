"""Models whose cached keys are what k_proj gives, turned by rotary embeddings as `turned` does it.

Methods that make keys anew build on that. Models that normalise keys, clip them, or turn neighbouring channels together
cache something else, and their configurations have no common word for it: what they cache of a few tokens tells.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.rotary import turned

try:
    from transformers import DynamicCache
except ImportError as error:
    raise ImportError("caches need an extra: pip install 'fairtrial[llm]'") from error

TOKENS = 4
TOLERANCE = 1e-3  # of the largest key of a layer, or what the type of keys resolves if that is coarser


def rotary_embedding(model: nn.Module) -> nn.Module:
    """The module that gives cosines and sines of positions.

    Raises:
        ValueError: the model has none.
    """
    found = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    require(found is not None, "model", type(model).__name__, "one with rotary embeddings")
    return found  # type: ignore[return-value]


@torch.no_grad()
def check_rotated_keys(
    model: Any,
    projections: Sequence[nn.Module],
    normed: Callable[[int, Float[Tensor, "b t n"]], Float[Tensor, "b t n"]] = lambda _, keys: keys,
) -> None:
    """Have a model read a few tokens, and refuse it if it caches other keys than those of its projections, turned.

    Args:
        model: of transformers.
        projections: what makes the keys of each layer.
        normed: what the keys of a layer are before they are turned, of the output of its projection.

    Raises:
        ValueError: the model has no rotary embeddings, clips keys, or caches other keys.
    """
    embedding, name = rotary_embedding(model), type(model).__name__
    clip = getattr(model.config, "clip_qkv", None)
    require(clip is None, "model", f"{name} with clip_qkv = {clip}", "one that does not clip keys and values")
    ids = torch.arange(TOKENS, device=next(model.parameters()).device)[None]
    outputs: dict[int, Tensor] = {}
    cache = DynamicCache()
    with ExitStack() as stack:
        for number, projection in enumerate(projections):

            def see(module: nn.Module, args: Any, output: Tensor, number: int = number) -> None:
                outputs[number] = output.clone()

            stack.callback(projection.register_forward_hook(see).remove)
        model(ids, past_key_values=cache, use_cache=True)
    cached = [found for layer in cache.layers if (found := getattr(layer, "keys", None)) is not None]
    require(len(cached) == len(outputs) == len(projections), "model", name, "one that caches the keys of every layer")
    cos, sin = (x[:, None] for x in embedding(outputs[0], ids))
    for number, keys in enumerate(cached):
        own = normed(number, outputs[number])
        fits = own.numel() == keys.numel()
        if fits:
            own = turned(own.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2), cos, sin)
            off = (own - keys).abs().max()
            fits = not bool(off > keys.abs().max() * max(TOLERANCE, 4 * torch.finfo(keys.dtype).eps))
        got = f"{name}, which caches other keys in layer {number}"
        require(fits, "model", got, "one that caches what k_proj gives, turned by halves of each head")
