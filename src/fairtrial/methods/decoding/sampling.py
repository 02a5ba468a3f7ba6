"""Continuing prompts token by token, drawing from a generator of one's own: what the decoders share.

`transformers`' `generate` draws from the global random state, takes a token's own embedding alone, and says nothing of
a step but the token. Where a decoder needs more it goes through `Continuation`, which needs no more of a model than
that it takes `inputs_embeds`; one that fills no cache of keys and values is given the whole text at each step.
Processors are applied to the model's logits and the temperature after them, in the order that `generate` has.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.methods.arguments import require
from fairtrial.methods.whole import require_whole, whole


def tempered(logits: Float[Tensor, "*b v"], temperature: float) -> Float[Tensor, "*b v"]:
    """Logits divided by the temperature; where that overflows, shifted first, so that the largest is 0."""
    divided = logits / temperature
    if temperature < 1 and bool((logits.isfinite() & ~divided.isfinite()).any()):
        shifted = (logits - logits.amax(-1, keepdim=True)).double() / temperature
        return shifted.to(logits.dtype)
    return divided


class Continuation:
    """Prompts that a causal language model continues, with its cache if it has one.

    Args:
        model: a causal language model of `transformers`.
        input_ids: prompts of one length, shorter ones padded on the left.
        attention_mask: 0 where there is padding; nowhere by default.

    Attributes:
        logits: of the next token, in float32 at least.

    Raises:
        ValueError: the model is no causal language model of `transformers` or an encoder and decoder, there is no
            prompt, the mask is of another shape, or prompts are padded on the right.
    """

    logits: Float[Tensor, "b v"]

    def __init__(self, model: Any, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None):
        require_causal(model)
        if model.config.is_encoder_decoder:
            raise ValueError("model must be a decoder alone, got an encoder and decoder")
        require(input_ids.numel() > 0, "input_ids", tuple(input_ids.shape), "of at least one token")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        fits = mask.shape == input_ids.shape
        require(fits, "attention_mask", tuple(mask.shape), f"of the shape of input_ids, {tuple(input_ids.shape)}")
        require(bool(mask[:, -1].all()), "attention_mask", mask[:, -1].tolist(), "1 at the end (pad on the left)")
        self.model, self.attention_mask = model, mask
        self.cache: Any = None
        self._before: dict[str, Tensor] = {}
        accepted = inspect.signature(_adapted(model).forward).parameters
        self._positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._run(input_ids=input_ids)

    def extend(self, **following: Tensor) -> None:
        """Go on by one token: `input_ids` of shape (b, 1), or `inputs_embeds` of shape (b, 1, d)."""
        self.attention_mask = F.pad(self.attention_mask, (0, 1), value=1)
        self._run(**following if self.cache is not None else self._whole(following))

    def _whole(self, following: dict[str, Tensor]) -> dict[str, Tensor]:
        """The text so far and what follows, as embeddings if either is."""
        if self._before.keys() == following.keys():
            return {name: torch.cat([self._before[name], value], 1) for name, value in following.items()}
        embed = self.model.get_input_embeddings()
        parts = [
            inputs["inputs_embeds"] if "inputs_embeds" in inputs else embed(inputs["input_ids"])
            for inputs in (self._before, following)
        ]
        return {"inputs_embeds": torch.cat(parts, 1)}

    @torch.no_grad()
    def _run(self, **following: Tensor) -> None:
        arguments: dict[str, Any] = {**following, **self._last_only}
        if self._positions:
            length = next(iter(following.values())).shape[1]
            arguments["position_ids"] = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        output = self.model(attention_mask=self.attention_mask, past_key_values=self.cache, use_cache=True, **arguments)
        self.cache = getattr(output, "past_key_values", None)
        self._before = following if self.cache is None else {}
        logits = output.logits[:, -1]
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_causal(model: Any) -> None:
    """Refuse a model that continues no text, such as one of masked language or without a head."""
    able = hasattr(model, "config") and hasattr(model, "device") and getattr(model, "can_generate", lambda: True)()
    require(able, "model", type(model).__name__, "a causal language model of transformers")


def _adapted(model: Any) -> Any:
    """The model inside an adapter of `peft`, which passes on what its own signature does not name."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | None) -> Int[Tensor, " e"]:
    """The tokens that end a text: those of the model's `generation_config` for None, none for an empty sequence."""
    require_causal(model)
    own = getattr(model, "generation_config", None)
    found = getattr(own, "eos_token_id", None) if eos_token_id is None else eos_token_id
    given = found.tolist() if isinstance(found, Tensor) else found
    ends = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    require(all(whole(end) for end in ends), "eos_token_id", found, "one or several whole numbers")
    return torch.tensor(ends, dtype=torch.long, device=model.device)


def padding_token(model: Any, ends: Int[Tensor, " e"]) -> int:
    """What follows a text that has ended: the `pad_token_id` of the model's `generation_config`, else an end token."""
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return int(pad) if pad is not None else int(ends[0]) if len(ends) else 0


def growing(
    model: Any,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None = None,
    *,
    max_new_tokens: int,
    processors: Sequence[Any] = (),
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
) -> Iterator[Int[Tensor, "b _"]]:
    """The prompts and what has been sampled so far, after each token; `sample` says what the arguments are."""
    require_whole("max_new_tokens", max_new_tokens)
    require(0 < temperature < math.inf, "temperature", temperature, "above 0 and finite")
    ends = end_tokens(model, eos_token_id)
    pad = padding_token(model, ends)
    continuation = Continuation(model, input_ids, attention_mask)
    sequences, ended = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for step in range(max_new_tokens):
        if step:
            continuation.extend(input_ids=sequences[:, -1:])
        scores = continuation.logits
        for processor in processors:
            scores = processor(sequences, scores)
        tokens = torch.multinomial(tempered(scores, temperature).softmax(-1), 1, generator=generator)
        tokens = tokens.masked_fill(ended[:, None], pad)
        sequences = torch.cat([sequences, tokens], 1)
        ended = ended | torch.isin(tokens[:, 0], ends)
        if streamer is not None:
            streamer.put(tokens[:, 0].cpu())
        yield sequences
        if bool(ended.all()):
            break
    if streamer is not None:
        streamer.end()


def sample(
    model: Any, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None, **options: Any
) -> Int[Tensor, "b _"]:
    """Prompts and their continuations, like `model.generate(…, do_sample=True)` but with a generator.

    Args:
        model: a causal language model of `transformers`.
        input_ids: prompts, padded on the left.
        attention_mask: 0 where there is padding; nowhere by default.
        **options: `max_new_tokens`; `processors`, applied to the logits in order; `temperature`, which divides what
            they leave (1); `eos_token_id`, one or several, by default those of the model's `generation_config`, and
            none for `()`; `generator`, by default the global one; `streamer`, as of `generate`.

    Nothing else of the `generation_config` is used: no top_k, penalty or stop strings of its own.

    Raises:
        ValueError: an argument is out of range, the model is no causal language model or has an encoder, or prompts
            are padded on the right.
    """
    sequences = input_ids
    for longer in growing(model, input_ids, attention_mask, **options):
        sequences = longer
    return sequences
