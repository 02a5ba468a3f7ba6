"""GrAInS: steering along what the most influential tokens do to the hidden states (Nguyen et al. 2025,
arXiv:2507.18043).

From triples of a prompt x, a preferred answer y⁺ and a dispreferred y⁻ one vector for each layer is made. Embeddings E⁺
and E⁻ of x y⁺ and x y⁻ have the preference

    f(E⁺, E⁻) = log p(last token of y⁺ | E⁺) - log p(last token of y⁻ | E⁻),

and integrated gradients from zero attribute it to the tokens, a_t = Σ_j E_tj ∫_0^1 ∂f(uE) / ∂E_tj du, each sequence by
itself, as f is a sum. The k tokens with the largest a_t are replaced by padding, which is attended to like any token;
what the replacement changes in the state of the last token, h(x y) - h(ablated x y), is collected for both sequences of
all triples. The vector v of a layer is the mean of these changes or their first principal component; with mode 'both'
the same for the k smallest a_t is taken off. Steering adds it to every token's state and keeps the norm:

    h̃ = h + λ v,   h ← h̃ ‖h‖ / (‖h̃‖ + 1e-8)

Differences from the authors' code. It reads the logits behind the last token, and so how likely that token is to be
repeated; here it is the token's own probability, whence its own attribution is 0. Its norms run over whatever axis 1
of `output[0]` is, which depends on the version of transformers; here they are each token's. It leaves the sign of
principal components to the solver; here v points along the mean change. Changes in the last layer are taken before the
final norm, where steering adds them. Answers follow the prompt without a space of ours. The integral is that of
Captum's default, Gauss-Legendre; with layer norms f(uE) changes so fast near u = 0 that 20 nodes are far from exact.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.whole import require_whole, whole

Attribution = Literal["ig", "gradient", "smoothgrad"]
SMOOTHING_DRAWS, SMOOTHING_SPREAD = 20, 0.01  # the authors'


class Attributions(NamedTuple):
    """What each token contributes to the preference, for the preferred and for the dispreferred sequence."""

    scores_pos: Float[Tensor, " t"]
    ids_pos: Int[Tensor, " t"]
    scores_neg: Float[Tensor, " u"]
    ids_neg: Int[Tensor, " u"]


def integrated_gradients(
    function: Callable[[Float[Tensor, "n *s"]], Float[Tensor, " n"]], inputs: Float[Tensor, "*s"], steps: int = 20
) -> Float[Tensor, "*s"]:
    """Integrated gradients from a baseline of zero, by Gauss-Legendre quadrature.

    Args:
        function: of a batch of points, each by itself.
        inputs: where its value is to be attributed.
        steps: nodes of the quadrature.
    """
    require_whole("steps", steps)
    nodes, weights = (torch.from_numpy(a).to(inputs) for a in np.polynomial.legendre.leggauss(steps))
    shape = (-1, *[1] * inputs.ndim)
    points = (nodes.add(1).div(2).view(shape) * inputs.detach()).requires_grad_()
    gradients = _gradients(function, points)
    mean: Tensor = torch.tensordot(weights / 2, gradients, 1)
    return inputs.detach() * mean


def _gradients(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """At each point; parameters get none, whether they are frozen or not."""
    with torch.enable_grad():
        gradients: Tensor = torch.autograd.grad(function(points).sum(), points)[0]
    return gradients


def token_attributions(
    model: Any,
    tokenizer: Any,
    prompt: str,
    pos: str,
    neg: str,
    method: Attribution = "ig",
    steps: int = 20,
    *,
    generator: torch.Generator | None = None,
) -> Attributions:
    """Attribute the preference for the last token of `prompt + pos` over that of `prompt + neg` to all tokens.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.
        tokenizer: its tokenizer.
        prompt, pos, neg: text and two answers, put together as they are.
        method: integrated gradients 'ig', 'gradient' times embedding, or 'smoothgrad', the sum over features of the
            gradient's mean over 20 draws of noise with standard deviation 0.01, as the authors have it.
        steps: nodes of the quadrature.
        generator: of the noise.

    Raises:
        ValueError: an argument is out of range, the model is in training mode, or a text has fewer than two tokens.
    """
    require(method in ("ig", "gradient", "smoothgrad"), "method", method, "'ig', 'gradient' or 'smoothgrad'")
    require_whole("steps", steps)
    require(not model.training, "model", "a model in training mode", "in evaluation mode: model.eval()")
    found = []
    for sign, text in ((1, prompt + pos), (-1, prompt + neg)):
        ids = torch.tensor(tokenizer(text).input_ids, device=model.device)
        require(len(ids) >= 2, "prompt with answer", text, "of at least two tokens")
        embeddings = model.get_input_embeddings()(ids).detach()
        function = partial(_last_token, model, ids)
        if method == "ig":
            scores = integrated_gradients(function, embeddings, steps)
        elif method == "gradient":
            scores = _gradients(function, embeddings[None].clone().requires_grad_())[0] * embeddings
        else:
            noise = torch.randn(SMOOTHING_DRAWS, *embeddings.shape, generator=generator).to(embeddings)
            scores = _gradients(function, (embeddings + SMOOTHING_SPREAD * noise).requires_grad_()).mean(0)
        found += [sign * scores.sum(-1), ids]
    return Attributions(*found)


def _last_token(model: Any, ids: Int[Tensor, " t"], embeddings: Float[Tensor, "n t d"]) -> Float[Tensor, " n"]:
    """log p of the last token, which is predicted from those before it."""
    logits: Tensor = model(inputs_embeds=embeddings[:, :-1]).logits[:, -1]
    return logits.log_softmax(-1)[:, ids[-1]]


def ablate_tokens(ids: Int[Tensor, " t"], indices: Int[Tensor, " k"], pad_id: int) -> Int[Tensor, " t"]:
    """A copy of the ids with `pad_id` at the given places."""
    return ids.index_fill(0, indices, pad_id)


def padding_of(tokenizer: Any) -> int:
    """The id of the padding token, or else of the unknown one.

    Raises:
        ValueError: the tokenizer has neither.
    """
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.unk_token_id
    require(found is not None, "tokenizer", "one without pad_token and unk_token", "one that has a pad_token")
    return int(found)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's transformer blocks.

    Raises:
        ValueError: there is no list of as many modules as the configuration has layers, there is an encoder too, or no
            configuration.
    """
    require(hasattr(model, "config"), "model", type(model).__name__, "a model of transformers")
    require(not model.config.is_encoder_decoder, "model", type(model).__name__, "a decoder alone")
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"model must have a list of {depth} layers, got {type(model).__name__}")


@torch.no_grad()
def last_states(model: Any, ids: Int[Tensor, "n t"]) -> Float[Tensor, "l n d"]:
    """What each layer gives out for the last token, before the final norm."""
    states: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: states.append(_hidden(output)[:, -1]))
        for layer in decoder_layers(model)
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def state_changes(model: Any, ids: Int[Tensor, " t"], indices: Int[Tensor, " k"], pad_id: int) -> Float[Tensor, "l d"]:
    """How the last token's state in each layer differs from that of the text without the tokens at these places."""
    plain, ablated = last_states(model, torch.stack([ids, ablate_tokens(ids, indices, pad_id)])).unbind(1)
    return plain - ablated


def steering_vector(changes: Float[Tensor, "n d"], method: Literal["pca", "mean"] = "pca") -> Float[Tensor, " d"]:
    """The mean of the changes, or the unit vector along which they vary most, on the side of the mean.

    Raises:
        ValueError: `method` is neither, a change is not finite, nothing changes, or all changes are the same and 'pca'
            finds no direction.
    """
    require(method in ("pca", "mean"), "method", method, "'pca' or 'mean'")
    require(bool(changes.isfinite().all()), "changes", "numbers that are not finite", "finite")
    require(bool(changes.any()), "changes", "zeros alone", "other than 0 somewhere")
    mean = changes.mean(0)
    if method == "mean":
        return mean
    varying = changes - mean
    require(bool(varying.any()), "changes", "the same in all rows", "different from each other for 'pca'")
    wide = varying.to(torch.promote_types(varying.dtype, torch.float32))
    component: Tensor = torch.linalg.svd(wide, full_matrices=False).Vh[0].to(varying.dtype)
    return component.neg() if component @ mean < 0 else component


def fit_steering_vectors(
    model: Any,
    tokenizer: Any,
    triples: Iterable[tuple[str, str, str]],
    k: int = 10,
    method: Literal["pca", "mean"] = "pca",
    mode: Literal["pos", "both"] = "pos",
    layers: Sequence[int] | None = None,
    *,
    attribution: Attribution = "ig",
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> dict[int, Float[Tensor, " d"]]:
    """A vector for each layer that points to the preferred answers.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.
        tokenizer: its tokenizer, with a padding or unknown token.
        triples: of prompt, preferred and dispreferred answer; about 50.
        k: tokens to be replaced in each sequence, at most as many as it has.
        method: 'pca', the authors', or 'mean'.
        mode: 'pos', or 'both' to take off what the least attributed tokens give; the authors' results have 'both'.
        layers: numbers from 0; all by default.
        attribution, steps, generator: as of `token_attributions`.

    Raises:
        ValueError: an argument is out of range, there are no triples, a text has fewer than k tokens, there is no such
            layer, or the model is in training mode.
    """
    require_whole("k", k)
    require(mode in ("pos", "both"), "mode", mode, "'pos' or 'both'")
    examples, pad_id = list(triples), padding_of(tokenizer)
    require(bool(examples), "triples", examples, "at least one")
    depth = len(decoder_layers(model))
    wanted = range(depth) if layers is None else layers
    there = all(whole(layer, 0, depth - 1) for layer in wanted)
    require(there, "layers", layers, f"whole numbers from 0 to {depth - 1}")
    most, least = [], []
    for prompt, pos, neg in examples:
        found = token_attributions(model, tokenizer, prompt, pos, neg, attribution, steps, generator=generator)
        for scores, ids in ((found.scores_pos, found.ids_pos), (found.scores_neg, found.ids_neg)):
            require(k <= len(ids), "k", k, f"at most {len(ids)}, the tokens of {prompt!r} with an answer")
            most.append(state_changes(model, ids, scores.topk(k).indices, pad_id))
            if mode == "both":
                least.append(state_changes(model, ids, scores.topk(k, largest=False).indices, pad_id))
    vectors = {}
    for layer in wanted:
        vectors[layer] = steering_vector(torch.stack([change[layer] for change in most]), method)
        if mode == "both":
            vectors[layer] = vectors[layer] - steering_vector(torch.stack([c[layer] for c in least]), method)
    return vectors


def steer(
    hidden: Float[Tensor, "*b d"], vector: Float[Tensor, " d"], strength: float, *, preserve_norm: bool = True
) -> Float[Tensor, "*b d"]:
    """h + λ v, of the norm that h had."""
    steered = hidden + strength * vector
    if not preserve_norm:
        return steered
    wide = torch.promote_types(hidden.dtype, torch.float32)
    was, becomes = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide) for x in (hidden, steered))
    return torch.mul(steered, (was / (becomes + 1e-8)).to(steered.dtype))


class SteeringHook:
    """A context in which a model's layers add steering vectors to every token's state.

    Args:
        model: a model of `transformers`; its parameters are not changed.
        vectors: by number of the layer, as `fit_steering_vectors` returns them.
        strength: λ, absolute: of unit vectors to be seen against the norm of the layer's states. The authors have 40
            in the last layer of an 8B model, whose states have norms of 50 to 100. 0 changes nothing.
        preserve_norm: give each state the norm that it had.

    Raises:
        ValueError: there is no such layer, a vector is not finite or not as wide as the model, or the strength is not
            finite.
        RuntimeError: it is entered a second time before it has been left.
    """

    def __init__(
        self, model: Any, vectors: Mapping[int, Float[Tensor, " d"]], strength: float, *, preserve_norm: bool = True
    ) -> None:
        self.layers, depth = decoder_layers(model), len(decoder_layers(model))
        there = all(whole(layer, 0, depth - 1) for layer in vectors)
        require(there, "vectors", list(vectors), f"of layers 0 to {depth - 1}")
        width = model.config.get_text_config().hidden_size
        for layer, vector in vectors.items():
            require(vector.shape == (width,), f"vectors[{layer}]", tuple(vector.shape), f"of shape {(width,)}")
            require(bool(vector.isfinite().all()), f"vectors[{layer}]", "numbers that are not finite", "finite")
        require(math.isfinite(strength), "strength", strength, "finite")
        self.vectors, self.strength, self.preserve_norm = dict(vectors), strength, preserve_norm
        self._handles: list[Any] = []

    def __enter__(self) -> "SteeringHook":
        if self._handles:
            raise RuntimeError("the vectors are being added already")
        if self.strength:
            for layer, vector in self.vectors.items():
                self._handles.append(self.layers[layer].register_forward_hook(partial(self._add, vector)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(self, vector: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = _hidden(output)
        steered = steer(hidden, vector.to(hidden), self.strength, preserve_norm=self.preserve_norm)
        return steered if isinstance(output, Tensor) else (steered, *output[1:])
