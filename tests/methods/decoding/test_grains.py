"""GrAInS: attributions with a known value, and vectors that are added and taken away again."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from fairtrial.methods.decoding import (
    SteeringHook,
    ablate_tokens,
    fit_steering_vectors,
    integrated_gradients,
    steering_vector,
    token_attributions,
)
from fairtrial.methods.decoding.grains import decoder_layers, last_states, state_changes, steer

F64 = torch.float64
PROMPT, POS, NEG = "The class statement defines a ", "class", "list"
TRIPLES = [(PROMPT, POS, NEG), ("An assignment statement evaluates the ", "expression", "operator")]


@pytest.fixture(scope="module")
def padded(small_gpt):
    """The byte model and a tokenizer that has a padding token."""
    tokenizer = copy.deepcopy(small_gpt.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return small_gpt.model, tokenizer


def hooks(model):
    """How many there are on its layers; transformers has some of its own once hidden states have been asked for."""
    return sum(len(layer._forward_hooks) for layer in decoder_layers(model))


def toy(points):
    w = torch.tensor([[1, 2], [-1, 0.5], [0.3, -0.7]], dtype=F64)
    return (points @ w.t()).log_softmax(-1)[..., 0]


def test_integrated_gradients_of_the_worked_example():
    x = torch.tensor([1.0, -2.0], dtype=F64)
    found = integrated_gradients(toy, x, steps=20)
    difference = (toy(x) - toy(torch.zeros_like(x))).item()
    assert difference == pytest.approx(-3.634647, abs=1e-6)
    assert found.tolist() == pytest.approx([0.814015, -4.448663], abs=1e-6)
    assert found.sum().item() == pytest.approx(difference, abs=1e-6)
    points = (torch.linspace(0, 1, 20, dtype=F64)[:, None] * x).requires_grad_()
    equal_weights = x * torch.autograd.grad(toy(points).sum(), points)[0].mean(0)
    assert equal_weights.tolist() == pytest.approx([0.813908, -4.427791], abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_integrated_gradients_add_up_to_the_difference(seed):
    generator = torch.Generator().manual_seed(seed)
    a, x = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((3, 4), (3, 4)))

    def smooth(points):
        return torch.tanh((points * a).sum((-2, -1)) / 4) + (points.square() * a).sum((-2, -1)).sin() / 10

    found = integrated_gradients(smooth, x, steps=40)
    assert found.sum().item() == pytest.approx((smooth(x) - smooth(0 * x)).item(), abs=1e-6)


@pytest.mark.parametrize("method", ["ig", "gradient", "smoothgrad"])
def test_attributions_are_separate_and_change_sign_when_answers_are_swapped(padded, method):
    model, tokenizer = padded
    options = {"method": method, "steps": 5}

    def run(pos, neg):
        return token_attributions(
            model, tokenizer, PROMPT, pos, neg, generator=torch.Generator().manual_seed(0), **options
        )

    found, swapped = run(POS, NEG), run(NEG, POS)
    assert found.ids_pos.tolist() == list((PROMPT + POS).encode())
    assert found.scores_pos.shape == found.ids_pos.shape
    assert torch.equal(found.ids_neg, swapped.ids_pos)
    if method != "smoothgrad":  # which draws anew for each
        torch.testing.assert_close(found.scores_pos, -swapped.scores_neg)
        torch.testing.assert_close(found.scores_neg, -swapped.scores_pos)
        torch.testing.assert_close(found.scores_pos, run(POS, "tuple").scores_pos)
    assert found.scores_pos[-1] == 0
    assert found.scores_pos[:-1].abs().min() > 0


def test_gradient_times_embedding_is_its_definition(padded):
    model, tokenizer = padded
    found = token_attributions(model, tokenizer, PROMPT, POS, NEG, method="gradient")
    embeddings = model.get_input_embeddings()(found.ids_pos[None]).detach().requires_grad_()
    value = model(inputs_embeds=embeddings).logits[0, -2].log_softmax(-1)[found.ids_pos[-1]]
    expected = (torch.autograd.grad(value, embeddings)[0] * embeddings)[0].sum(-1).detach()
    torch.testing.assert_close(found.scores_pos, expected, rtol=1e-4, atol=1e-5)


def test_layer_norms_leave_a_gap_that_is_reported(padded):
    model, tokenizer = padded
    found = token_attributions(model, tokenizer, PROMPT, POS, NEG)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(found.ids_pos[None])
        ends = [model(inputs_embeds=e[:, :-1]).logits[0, -1].log_softmax(-1)[found.ids_pos[-1]] for e in
                (embeddings, 0 * embeddings)]  # fmt: skip
    assert math.isfinite(found.scores_pos.sum().item() - (ends[0] - ends[1]).item())


def test_attribution_leaves_model_and_random_state_alone(padded):
    model, tokenizer = padded
    before, hooked = torch.get_rng_state(), hooks(model)
    fit_steering_vectors(model, tokenizer, TRIPLES[:1], k=3, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == hooked


def test_states_are_those_of_the_model(padded):
    model, tokenizer = padded
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    found = last_states(model, ids)
    for layer in range(3):  # the last of hidden_states is behind the final norm
        torch.testing.assert_close(found[layer], states[layer + 1][:, -1])
    torch.testing.assert_close(model.model.norm(found[3]), states[4][:, -1])


def test_changes_are_those_of_the_ablated_text(padded):
    model, tokenizer = padded
    ids = torch.tensor(tokenizer(PROMPT).input_ids)
    places = torch.tensor([2, 5])
    ablated = ablate_tokens(ids, places, 0)
    assert ablated[places].tolist() == [0, 0]
    assert int((ablated != ids).sum()) == 2
    expected = (last_states(model, ids[None]) - last_states(model, ablated[None]))[:, 0]
    torch.testing.assert_close(state_changes(model, ids, places, 0), expected, rtol=1e-4, atol=1e-4)


def test_vectors_are_made_of_the_changes(padded):
    model, tokenizer = padded
    options = {"k": 4, "steps": 4, "layers": [1, 3]}
    fitted = fit_steering_vectors(model, tokenizer, TRIPLES, method="mean", **options)
    changes, least = [], []
    for triple in TRIPLES:
        found = token_attributions(model, tokenizer, *triple, steps=4)
        for scores, ids in ((found.scores_pos, found.ids_pos), (found.scores_neg, found.ids_neg)):
            order = scores.argsort(descending=True)
            changes.append(state_changes(model, ids, order[:4], 0))
            least.append(state_changes(model, ids, order[-4:], 0))
    assert list(fitted) == [1, 3]
    torch.testing.assert_close(fitted[3], torch.stack(changes).mean(0)[3])
    both = fit_steering_vectors(model, tokenizer, TRIPLES, method="mean", mode="both", **options)
    torch.testing.assert_close(both[1], (torch.stack(changes) - torch.stack(least)).mean(0)[1])
    principal = fit_steering_vectors(model, tokenizer, TRIPLES, **options)
    assert principal[1].norm().item() == pytest.approx(1, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
def test_means_scale_and_components_are_of_unit_length_along_the_mean(seed, scale):
    changes = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.5
    torch.testing.assert_close(steering_vector(scale * changes, "mean"), scale * steering_vector(changes, "mean"))
    component = steering_vector(changes)
    torch.testing.assert_close(component.norm(), torch.tensor(1.0, dtype=F64))
    assert component @ changes.mean(0) >= 0
    torch.testing.assert_close(steering_vector(scale * changes), component)
    _, vectors = torch.linalg.eigh(torch.cov(changes.t()))
    assert abs(component @ vectors[:, -1]).item() == pytest.approx(1, abs=1e-6)


def test_a_steered_state_keeps_its_norm():
    hidden = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=F64)
    vector = torch.tensor([0.6, -0.8], dtype=F64)
    expected = torch.tensor([[3.737047, 3.321819], [0.894427, -0.447214]], dtype=F64)
    torch.testing.assert_close(steer(hidden, vector, 1.0), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(steer(hidden, vector, 1.0).norm(dim=-1), hidden.norm(dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(steer(hidden, vector, 2.0, preserve_norm=False), hidden + 2 * vector)


def test_the_hook_steers_every_token_and_is_gone_afterwards(padded):
    model, tokenizer = padded
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    vectors, seen, before = {1: torch.randn(128, generator=torch.Generator().manual_seed(0))}, [], hooks(model)
    watch = decoder_layers(model)[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        plain = model(ids).logits
        with SteeringHook(model, vectors, 2.0):
            steered = model(ids).logits
        with SteeringHook(model, vectors, 0.0):
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)
    watch.remove()
    torch.testing.assert_close(seen[1], steer(seen[0], vectors[1], 2.0))
    assert not torch.allclose(steered, plain)
    with pytest.raises(KeyError), SteeringHook(model, vectors, 2.0):
        raise KeyError
    assert hooks(model) == before
    with SteeringHook(model, vectors, 1.0, preserve_norm=False):
        assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == ids.shape[1] + 3


def test_misuse_is_refused_with_the_argument_named(padded, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    model, tokenizer = padded
    wrong_options = (
        *({"k": k} for k in (0, 500, 2.5, True)),
        *({"layers": layers} for layers in ([4], [0.5], [True])),
        *({"steps": steps} for steps in (0, 2.5)),
        {"steps": 2.5, "attribution": "gradient"},
        {"mode": "neg"},
        {"method": "median"},
    )
    for wrong in wrong_options:
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            fit_steering_vectors(model, tokenizer, TRIPLES[:1], **{"k": 2, "steps": 1, **wrong})
    with pytest.raises(ValueError, match="triples must be at least one"):
        fit_steering_vectors(model, tokenizer, [])
    with pytest.raises(ValueError, match="changes must be other than 0"):
        steering_vector(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="prompt with answer must be of at least two tokens"):
        token_attributions(model, tokenizer, "", "a", "b")
    with pytest.raises(ValueError, match="strength must be finite"):
        SteeringHook(model, {}, math.nan)
    for layer in (7, 0.5, "first"):
        with pytest.raises(ValueError, match="vectors must be of layers 0 to 3"):
            SteeringHook(model, {layer: torch.ones(128)}, 1.0)
    with pytest.raises(ValueError, match="changes must be finite"):
        steering_vector(torch.tensor([[1.0, math.nan], [2.0, 3.0]]))
    with pytest.raises(ValueError, match="model must be a model of transformers, got 'Linear'"):
        decoder_layers(torch.nn.Linear(2, 2))
    training = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        fit_steering_vectors(training, tokenizer, TRIPLES, k=2)


def test_a_tokenizer_needs_something_to_put_in_place_of_a_token(small_gpt):
    with pytest.raises(ValueError, match="tokenizer must be one that has a pad_token"):
        fit_steering_vectors(*small_gpt, TRIPLES, k=2)


def test_half_precision_is_enough():
    changes = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        component = steering_vector(changes.to(dtype))
        assert component.dtype == dtype
        torch.testing.assert_close(component.float(), steering_vector(changes), atol=0.03, rtol=0)
    zeros = steer(torch.zeros(2, 4, dtype=torch.float16), torch.zeros(4, dtype=torch.float16), 1.0)
    assert zeros.tolist() == torch.zeros(2, 4).tolist()
    assert steer(torch.full((1, 4), 6e4).half(), torch.zeros(4).half(), 1.0).isfinite().all()


def test_a_hook_that_is_on_is_not_put_on_again(padded):
    model, _ = padded
    before = hooks(model)
    with SteeringHook(model, {1: torch.ones(128)}, 1.0) as hook:
        with pytest.raises(RuntimeError, match="being added already"):
            hook.__enter__()
        assert hooks(model) == before + 1
    assert hooks(model) == before


def test_unsuitable_vectors_and_models_are_refused(padded):
    model, _ = padded
    for vector in (torch.ones(7), torch.ones(1)):
        with pytest.raises(ValueError, match=r"vectors\[1\] must be of shape \(128,\)"):
            SteeringHook(model, {1: vector}, 1.0)
    with pytest.raises(ValueError, match=r"vectors\[0\] must be finite"):
        SteeringHook(model, {0: torch.full((128,), math.nan)}, 1.0)
    with pytest.raises(ValueError, match="changes must be different from each other for 'pca'"):
        steering_vector(torch.tensor([[0.0, 3, 4]] * 3))
    tiny = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 10}
    with pytest.raises(ValueError, match="model must be a decoder alone"):
        decoder_layers(T5ForConditionalGeneration(T5Config(**tiny)))
