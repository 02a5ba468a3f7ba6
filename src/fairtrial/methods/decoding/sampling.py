"""Continuing prompts token by token, drawing from a generator of one's own: what the decoders share.

`transformers`' `generate` draws from the global random state, takes a token's own embedding alone, and says nothing of
a step but the token. Where a decoder needs more it goes through `Continuation`, which needs no more of a model than
that it takes `inputs_embeds` and fills a cache. Processors are applied to the model's logits and the temperature after
them, in the order that `generate` has.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.methods.arguments import require


class Continuation:
    """Prompts that a causal language model continues, with its cache.

    Args:
        model: a causal language model of `transformers`.
        input_ids: prompts of one length, shorter ones padded on the left.
        attention_mask: 0 where there is padding; nowhere by default.

    Attributes:
        logits: of the next token, in float32 at least.

    Raises:
        ValueError: the model is an encoder and decoder, there is no prompt, or it is padded on the right.
    """

    logits: Float[Tensor, "b v"]

    def __init__(self, model: Any, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None):
        if model.config.is_encoder_decoder:
            raise ValueError("model must be a decoder alone, got an encoder and decoder")
        require(input_ids.numel() > 0, "input_ids", tuple(input_ids.shape), "of at least one token")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        require(bool(mask[:, -1].all()), "attention_mask", mask[:, -1].tolist(), "1 at the end (pad on the left)")
        self.model, self.attention_mask = model, mask
        self.cache: Any = None
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._run(input_ids=input_ids)

    def extend(self, **following: Tensor) -> None:
        """Go on by one token: `input_ids` of shape (b, 1), or `inputs_embeds` of shape (b, 1, d)."""
        self.attention_mask = F.pad(self.attention_mask, (0, 1), value=1)
        self._run(**following)

    @torch.no_grad()
    def _run(self, **following: Tensor) -> None:
        arguments: dict[str, Any] = {**following, **self._last_only}
        if self._positions:
            length = next(iter(following.values())).shape[1]
            arguments["position_ids"] = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        output = self.model(attention_mask=self.attention_mask, past_key_values=self.cache, use_cache=True, **arguments)
        self.cache = output.past_key_values
        logits = output.logits[:, -1]
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | None) -> Int[Tensor, " e"]:
    """The tokens that end a text: those of the model's `generation_config` for None, none for an empty sequence."""
    found = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    return torch.tensor(ends, dtype=torch.long, device=model.device)


def padding_token(model: Any, ends: Int[Tensor, " e"]) -> int:
    """What follows a text that has ended: the `pad_token_id` of the model's `generation_config`, else an end token."""
    pad = model.generation_config.pad_token_id
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
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature > 0, "temperature", temperature, "above 0")
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
        tokens = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)
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

    Raises:
        ValueError: an argument is out of range, the model has an encoder, or prompts are padded on the right.
    """
    sequences = input_ids
    for longer in growing(model, input_ids, attention_mask, **options):
        sequences = longer
    return sequences
