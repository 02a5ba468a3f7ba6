"""How post-training formats and sampling temperature act together: the study of Roy 2023 (arXiv:2309.05210).

The study generates text with models in nf4, fp4 (with and without double quantisation), int8 and bfloat16 at many
temperatures, lengths and top-k, and looks at quality, speed and memory. `WeightFormat` puts a model's weights into one
of these formats; `generation_sweep` is the study's loop. Which measure of quality the paper took could not be found
out, so the measures are this library's own:

- of generated text, the mean negative log-likelihood of its tokens under a reference model, in nats: m_q(T) for format
  q at temperature T. What the format adds is D_q(T) = m_q(T) - m_ref(T);
- without sampling, KL(softmax(z_ref/T) ‖ softmax(z_q/T)) at positions of given text. It is smooth in T, and for large T
  it falls as T⁻²;
- `temperature_sensitivity` of either: how large it becomes, how steep it is, and how steep within a zone of
  temperatures (the paper's is 0.5 to 0.8) and on both sides of it.

A format is the more resilient the smaller its largest |D_q(T)| and the smaller its slope.

A task may ask for a number of bits: `WeightFormat` has those of its format whatever the task asks for.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.decoding.sampling import Continuation, end_tokens
from fairtrial.methods.evaluation import evaluating
from fairtrial.methods.quantization.quantize import Found, Want, quantize_, tensor_bytes
from fairtrial.methods.quantization.weight_formats import FORMATS, FormatLinear, check_format, check_weight, in_format
from fairtrial.methods.registry import method

ZONE = (0.5, 0.8)  # the paper's


@method(paper="ptq_impact", slot="quantizer")
@dataclass(frozen=True)
class WeightFormat:
    """Every linear layer's weights in a format whose scales are largest magnitudes; needs no data.

    Args:
        fmt: 'nf4', 'nf4-dq', 'fp4', 'fp4-dq', 'int8' or 'bf16'; -dq has its scales in 8 bits.
        block_size: consecutive weights that share a scale in the formats of 4 bits; 64 is bitsandbytes' default.
        threshold: of int8, at least 0: columns of activations with a larger magnitude are multiplied in float16.

    Raises:
        ValueError: an argument lies outside its range; when quantising, weights that are not finite.
    """

    fmt: str = "nf4"
    block_size: int = 64
    threshold: float = 6.0

    wants: ClassVar[frozenset[Want]] = frozenset()

    def __post_init__(self) -> None:
        check_format(self.fmt, self.block_size)
        require(self.threshold >= 0, "threshold", self.threshold, "at least 0")

    def check(self, name: str, layer: nn.Linear) -> None:
        try:
            check_weight(layer.weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    @torch.no_grad()
    def quantize(self, name: str, layer: nn.Linear, found: Found) -> FormatLinear:
        return in_format(layer.weight, layer.bias, self.fmt, self.block_size, self.threshold)


def apply_ptq(model: nn.Module, fmt: str, skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """Put the weights of a model's linear layers into a format, in place; returns the model.

    Args:
        model: in evaluation mode afterwards.
        fmt: as in `WeightFormat`.
        skip: names of layers that are left alone, whole or their last part.

    Raises:
        ValueError: there is no such format, or `quantize_` refuses the model.
    """
    return quantize_(model, WeightFormat(fmt), skip=skip)


# Without sampling --------------------------------------------------------------------------------------------------


def temperature_divergence(
    logits_ref: Float[Tensor, "*b v"], logits_q: Float[Tensor, "*b v"], temperatures: Sequence[float]
) -> Float[Tensor, "t *b"]:
    """KL(softmax(z_ref/T) ‖ softmax(z_q/T)) in nats, at each temperature and position.

    A token that the reference excludes by -inf adds 0; one that only the other excludes makes it infinite.

    Raises:
        ValueError: shapes differ, a temperature is not above 0, or logits are not numbers, infinite or, at a position,
            all -inf.
    """
    require(logits_q.shape == logits_ref.shape, "logits_q", tuple(logits_q.shape), f"{tuple(logits_ref.shape)}, as ref")
    check_temperatures(temperatures)
    for name, logits in (("logits_ref", logits_ref), ("logits_q", logits_q)):
        require(not bool(logits.isnan().any()), name, "NaN", "numbers")
        require(bool(logits.amax(-1).isfinite().all()), name, "others", "finite or -inf, and not all -inf")
    wide = torch.promote_types(logits_ref.dtype, torch.float32)
    divergences = []
    for temperature in temperatures:
        p, q = ((z.to(wide) / temperature).log_softmax(-1) for z in (logits_ref, logits_q))
        divergences.append((p.exp() * torch.where(p == -float("inf"), 0.0, p - q)).sum(-1))
    return torch.stack(divergences)


def check_temperatures(temperatures: Sequence[float]) -> None:
    require(len(temperatures) > 0, "temperatures", temperatures, "at least one")
    require(all(0 < t < float("inf") for t in temperatures), "temperatures", temperatures, "above 0 and finite")


class Sensitivity(NamedTuple):
    """How something depends on temperature, for each unit that it was measured on.

    Attributes:
        largest: the largest magnitude at any temperature.
        slope: from the lowest to the highest temperature, per unit of temperature.
        below, inside, above: the same, in front of the zone, in it, and behind it.
    """

    largest: Float[Tensor, "*b"]
    slope: Float[Tensor, "*b"]
    below: Float[Tensor, "*b"]
    inside: Float[Tensor, "*b"]
    above: Float[Tensor, "*b"]


def temperature_sensitivity(
    temperatures: Sequence[float], values: Float[Tensor, "t *b"], zone: tuple[float, float] = ZONE
) -> Sensitivity:
    """Largest magnitude and slopes of values that were measured at several temperatures.

    Args:
        temperatures: in rising order; both ends of the zone are among them, but for rounding, and one on either side.
        values: at each temperature, such as `temperature_divergence` or D_q(T).
        zone: its two ends.

    Raises:
        ValueError: the temperatures are not like that, or are not as many as the values.
    """
    check_temperatures(temperatures)
    require(len(values) == len(temperatures), "values", len(values), f"of {len(temperatures)} temperatures")
    require(list(temperatures) == sorted(set(temperatures)), "temperatures", temperatures, "in rising order")
    found = [place for end in zone for place, t in enumerate(temperatures) if math.isclose(t, end)]
    places = [0, *found, len(temperatures) - 1]
    fits = len(found) == 2 and places == sorted(set(places))
    require(fits, "temperatures", temperatures, f"around both ends of the zone, {zone}, and with these among them")

    def slope(start: int, end: int) -> Tensor:
        return (values[end] - values[start]) / (temperatures[end] - temperatures[start])

    first, low, high, last = places
    return Sensitivity(values.abs().amax(0), slope(first, last), slope(first, low), slope(low, high), slope(high, last))


# With sampling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def generation_sweep(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    formats: Sequence[str],
    temperatures: Sequence[float],
    top_ks: Sequence[int] = (0,),
    max_new_tokens: int = 40,
    seeds: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """Generate from every prompt in every format, at every temperature and top-k, with every seed.

    All prompts go through the model as one batch, padded on the left. Noise is paired: a seed's draws for a prompt and
    a place are the same for all formats and temperatures (the most likely token after adding Gumbel noise to z/T).

    Args:
        model: of transformers, which continues text, in evaluation mode for this; it stays as it is, each format gets a
            copy.
        tokenizer: of the model.
        prompts: texts, none of them empty.
        formats: as in `WeightFormat`, and 'none' for the model as it is.
        temperatures: above 0.
        top_ks: of how many tokens one is drawn; 0 for all of them.
        max_new_tokens: at least 1.
        seeds: of the draws.

    Returns:
        A row for each generation, as pandas and polars take them: `format`, `temperature`, `top_k`, `seed`, `prompt`
        (its place), `text`, `new_tokens` (up to the end of text), `nll` (mean over them under the given model, in
        nats), `tokens_per_second` (of the batch), `peak_bytes` (CUDA's peak; elsewhere weights, buffers and the cache).

    Raises:
        ValueError: there is nothing to do, a format is not known, or an argument is out of range.
    """
    lists: Mapping[str, Sequence[Any]] = {"prompts": prompts, "formats": formats, "top_ks": top_ks, "seeds": seeds}
    for name, values in lists.items():
        require(len(values) > 0, name, values, "at least one")
    check_temperatures(temperatures)
    require(set(formats) <= {"none", *FORMATS}, "formats", formats, f"of none, {', '.join(FORMATS)}")
    require(all(k >= 0 for k in top_ks), "top_ks", top_ks, "at least 0")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    with evaluating(model):
        return list(_generations(model, tokenizer, prompts, formats, temperatures, top_ks, max_new_tokens, seeds))


def _generations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    formats: Sequence[str],
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    max_new_tokens: int,
    seeds: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The rows of a sweep."""
    ids, mask = left_padded([tokenizer(prompt).input_ids for prompt in prompts], model.device)
    for fmt in formats:
        changed = model if fmt == "none" else apply_ptq(copy.deepcopy(model), fmt)
        for temperature, top_k, seed in ((t, k, s) for t in temperatures for k in top_ks for s in seeds):
            generator = torch.Generator(ids.device).manual_seed(seed)
            if ids.is_cuda:
                torch.cuda.reset_peak_memory_stats(ids.device)
            start = perf_counter()
            drawn = sample(changed, ids, mask, max_new_tokens, temperature, top_k, generator)
            seconds = perf_counter() - start
            peak = torch.cuda.max_memory_allocated(ids.device) if ids.is_cuda else drawn.bytes + tensor_bytes(changed)
            lengths = drawn.mask.sum(1)
            nll = likelihoods(model, ids, mask, drawn)
            for place, (tokens, length) in enumerate(zip(drawn.tokens, lengths.tolist(), strict=True)):
                yield {
                    "format": fmt,
                    "temperature": temperature,
                    "top_k": top_k,
                    "seed": seed,
                    "prompt": place,
                    "text": tokenizer.decode(tokens[:length], skip_special_tokens=True),
                    "new_tokens": length,
                    "nll": nll[place].item(),
                    "tokens_per_second": int(lengths.sum()) / seconds,
                    "peak_bytes": peak,
                }


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Token ids of one length, with the mask of those that count."""
    require(all(len(prompt) > 0 for prompt in prompts), "prompts", "one without a token", "none of them empty")
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()


class Drawn(NamedTuple):
    """What was drawn after prompts.

    Attributes:
        tokens: drawn ones.
        mask: which of them count: all up to the first end of text, that included.
        bytes: of the cache at the end.
    """

    tokens: Int[Tensor, "n m"]
    mask: Bool[Tensor, "n m"]
    bytes: int


@torch.no_grad()
def sample(
    model: Any,
    input_ids: Int[Tensor, "n t"],
    attention_mask: Int[Tensor, "n t"],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Drawn:
    """Continue prompts by tokens drawn at a temperature, all of them or among the top k."""
    continuation = Continuation(model, input_ids, attention_mask)
    drawn: list[Tensor] = []
    for step in range(max_new_tokens):
        if step:
            continuation.extend(input_ids=drawn[-1])
        logits = continuation.logits.float()
        if 0 < top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -float("inf"))
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
        gumbel = -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
        drawn.append((logits / temperature + gumbel).argmax(-1, keepdim=True))
    tokens = torch.cat(drawn, 1)
    ended = torch.isin(tokens, end_tokens(model, None))
    size = sum(t.nbytes for layer in continuation.cache.layers for t in (layer.keys, layer.values))
    return Drawn(tokens, ended.cumsum(1) - ended.long() == 0, size)


@torch.no_grad()
def likelihoods(
    model: Any, input_ids: Int[Tensor, "n t"], attention_mask: Int[Tensor, "n t"], drawn: Drawn
) -> Float[Tensor, " n"]:
    """Mean negative log-likelihood, in nats, of the drawn tokens of each row under a model."""
    ids = torch.cat([input_ids, drawn.tokens], 1)
    mask = torch.cat([attention_mask, torch.ones_like(drawn.tokens)], 1)
    kept = drawn.tokens.shape[1] + 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept)
    scores = output.logits[:, :-1].float().log_softmax(-1)
    nats = -scores.gather(-1, drawn.tokens[..., None])[..., 0]
    mean: Tensor = (nats * drawn.mask).sum(1) / drawn.mask.sum(1)
    return mean
