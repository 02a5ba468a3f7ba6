"""A decoder's layers, and what they are called with, for caches that need more than the keys and values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fairtrial.methods.arguments import require


def decoder_layers(model: nn.Module) -> dict[int, Any]:
    """The layers of a model of transformers that have an attention `self_attn`, by their number.

    Raises:
        ValueError: there are none, or two of a number, as in a model with an encoder and a decoder.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(getattr(m, "self_attn", None), "layer_idx")]
    by_number: dict[int, Any] = {layer.self_attn.layer_idx: layer for layer in layers}
    fits = bool(layers) and sorted(by_number) == list(range(len(layers)))
    require(fits, "model", type(model).__name__, "a decoder of transformers whose layers have an attention self_attn")
    return by_number


@contextmanager
def watched(
    cache: object, modules: Mapping[int, nn.Module], see: Callable[[int, Tensor, Mapping[str, Any]], None]
) -> Iterator[None]:
    """Within, `see(number, hidden_states, keyword arguments)` is told of each call of a module with the cache."""

    def hook(number: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("past_key_values") is cache:
                see(number, args[0] if args else kwargs["hidden_states"], kwargs)

        return before

    with ExitStack() as stack:
        for number, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(number), with_kwargs=True).remove)
        yield
