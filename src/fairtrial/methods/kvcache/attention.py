"""Caches that have a part in attention: they see queries, or say which tokens a query may look at.

Such a cache works within `with cache.attached_to(model):`. Until then the model's layers call the cache's `attend` for
the step between `update` and the output projection, by way of transformers' attention interface, whatever the model's
own implementation of attention is; models that do not use that interface are refused. Attention itself is PyTorch's
`scaled_dot_product_attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fairtrial.methods.arguments import require
from fairtrial.methods.kvcache.held import HeldCache

_numbers = count()


class AttendingCache(HeldCache):
    """A cache whose `attend` is asked for the attention of every layer that has just called `update`."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self._attached = False
        self._updated: int | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer, as the functions of transformers' attention interface give it."""
        raise NotImplementedError

    @contextmanager
    def attached_to(self, model: nn.Module) -> Iterator[None]:
        """Have a model's layers ask this cache for attention; what was set is put back on leaving.

        Calls of the model with another cache, or with none, go on as if nothing were attached.

        Raises:
            ValueError: the model is or has an encoder, has another number of layers, or does not use transformers'
                attention interface.
            RuntimeError: the cache is attached already; or, on leaving, its last layer was not asked for attention.
        """
        config: Any = getattr(model, "config", None)
        causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
        fits = not getattr(config, "is_encoder_decoder", False) and (any(causal) or not causal)
        require(fits, "model", type(model).__name__, "a causal one without an encoder")
        layers = getattr(config, "num_hidden_layers", None)
        require(layers == len(self.layers), "model", f"one of {layers} layers", f"of {len(self.layers)} layers")
        if self._attached:
            raise RuntimeError("the cache is attached to a model already")
        name, before = f"fairtrial_{next(_numbers)}", config._attn_implementation
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        try:
            model.set_attn_implementation(name)  # type: ignore[operator]
            found = config._attn_implementation
            require(found == name, "model", type(model).__name__, "one that uses transformers' attention interface")
            self._attached = True
            yield
            self._check_asked()
        finally:
            self._attached, self._updated = False, None
            model.set_attn_implementation(before)  # type: ignore[operator]
            del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self._attached:
            raise RuntimeError(f"{type(self).__name__} is used within `with cache.attached_to(model):`")
        self._check_asked()
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._updated = layer_idx
        return found

    def reset(self) -> None:
        super().reset()
        self._updated = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached."""
        return self.__dict__ | {"_attached": False, "_updated": None}

    def _check_asked(self) -> None:
        """Refuse to go on where a layer has called `update`, but not what follows."""
        layer, self._updated = self._updated, None
        if layer is not None:
            raise RuntimeError(
                f"the attention of layer {layer} has not asked this {type(self).__name__}: it is another model's, "
                "or another cache has been attached to the model since"
            )

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        ours, self._updated = self._updated is not None, None
        attention = self.attend if ours else sdpa_attention_forward
        return attention(module, query, key, value, attention_mask, **options)
