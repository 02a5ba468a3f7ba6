import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fairtrial.methods.kvcache import (
    BlockSizes,
    KVPredictionModel,
    KVPredictor,
    block_sizes,
    default_layer_map,
    kv_prediction_loss,
    layer_pruned_copy,
    pruned_layer_map,
    ttft_flops,
)

SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}


def model(layers, heads, kv_heads, seed=0, *, kind="llama"):
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    config = AutoConfig.for_model(kind, **SHAPE, **counts, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    made = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2, generator=generator)
    return made


def identity(base, auxiliary, predictor=None):
    made = KVPredictionModel(base, auxiliary, predictor)
    for linear in (*made.predictor.keys, *made.predictor.values):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return made


def tokens(batch=2, length=12, seed=0):
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n_base", "n_aux", "expected"),
    [
        (28, 16, [i for i in range(12) for _ in range(2)] + [12, 13, 14, 15]),
        (28, 20, [i for i in range(8) for _ in range(2)] + list(range(8, 20))),
        (36, 16, [i for i in range(4) for _ in range(3)] + [i for i in range(4, 16) for _ in range(2)]),
        (28, 7, [i for i in range(7) for _ in range(4)]),
        (36, 20, [i for i in range(16) for _ in range(2)] + list(range(16, 20))),
        (36, 28, [i for i in range(8) for _ in range(2)] + list(range(8, 28))),
    ],
)
def test_the_papers_layer_maps(n_base, n_aux, expected):
    assert default_layer_map(n_base, n_aux) == expected


@given(n_base=st.integers(1, 60), data=st.data())
def test_layer_maps_rise_over_all_auxiliary_layers(n_base, data):
    n_aux = data.draw(st.integers(1, n_base))
    found = default_layer_map(n_base, n_aux)
    assert len(found) == n_base
    assert sorted(set(found)) == list(range(n_aux))
    assert all(b - a in (0, 1) for a, b in pairwise(found))


def test_the_layer_map_of_a_pruned_model():
    keep = [i for i in range(12) if i % 4 != 3]
    assert pruned_layer_map(12, keep) == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8]


def test_a_pruned_copy_is_the_model_without_the_other_layers():
    base = model(4, 4, 2)
    pruned, ids = layer_pruned_copy(base, [0, 2, 3]), tokens()
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1, 2]
    assert (pruned.config.num_hidden_layers, base.config.num_hidden_layers) == (3, 4)
    assert pruned.model.layers[1].mlp.up_proj.weight.data_ptr() != base.model.layers[2].mlp.up_proj.weight.data_ptr()
    state = {name: p for name, p in base.state_dict().items() if "layers.1." not in name}
    renamed = {name.replace("layers.2.", "layers.1.").replace("layers.3.", "layers.2."): p for name, p in state.items()}
    other = LlamaForCausalLM(pruned.config).eval()
    other.load_state_dict(renamed)
    torch.testing.assert_close(pruned(ids).logits, other(ids).logits)
    assert pruned.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])  # no norm of keys, one for each head, one for all
def test_the_base_as_its_own_auxiliary_changes_nothing(kind):
    base = model(3, 4, 2, kind=kind)
    made, ids = identity(base, copy.deepcopy(base)), tokens()
    with torch.no_grad():
        expected = base(ids).logits
    torch.testing.assert_close(made(ids).logits, expected, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(made.generate(ids, **options), base.generate(ids, **options))
    found = made.predicted_cache(ids)
    plain = base(ids, use_cache=True).past_key_values
    for ours, theirs in zip(found.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


def test_generation_with_padding_and_beams():
    base = model(3, 4, 2)
    made, ids, mask = identity(base, copy.deepcopy(base)), tokens(), torch.ones(2, 12, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    for more in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, **more}
        assert torch.equal(made.generate(ids, **options), base.generate(ids, **options))


def test_every_map_is_used():
    base = model(3, 4, 2)
    ids = tokens()
    with torch.no_grad():
        expected = base(ids).logits
        for kind in ("keys", "values"):
            for layer in range(3):
                made = identity(base, copy.deepcopy(base))
                getattr(made.predictor, kind)[layer].bias += torch.linspace(0, 1, 16)
                assert (made(ids).logits - expected).abs().max() > 1e-2
                cache = made.predicted_cache(ids[:, :-1])
                found = base(ids[:, -1:], past_key_values=cache).logits
                assert (found[:, -1] - expected[:, -1]).abs().max() > 1e-3


def test_the_form_of_training_looks_at_predicted_keys_and_values_only():
    base, auxiliary = model(2, 4, 2), model(1, 2, 1, seed=1)
    made = KVPredictionModel(base, auxiliary)
    for linear in (*made.predictor.keys, *made.predictor.values):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    with torch.no_grad():
        found = made(tokens()).logits
        x = base.model.embed_tokens(tokens())
        for layer in base.model.layers:  # attention over values of 0 adds nothing
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        torch.testing.assert_close(found, base.lm_head(base.model.norm(x)), rtol=1e-4, atol=1e-4)


def test_different_widths_and_a_frozen_base():
    base, auxiliary = model(4, 4, 2), model(2, 8, 4, seed=1)
    made, ids = KVPredictionModel(base, auxiliary), tokens()
    assert [tuple(linear.weight.shape) for linear in made.predictor.keys] == [(16, 32)] * 4
    assert made.predictor.layer_map == [0, 0, 1, 1]
    before = copy.deepcopy(base.state_dict())
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        loss = made(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None for p in made.predictor.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert made.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_a_perfect_prediction_leaves_the_cross_entropies():
    base, ids = model(3, 4, 2), tokens()
    made = identity(base, copy.deepcopy(base))
    found = made(ids, labels=ids)
    entropy = F.cross_entropy(base(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, 2 * entropy, rtol=1e-4, atol=1e-4)
    for ours, own in ((found.keys, found.target_keys), (found.values, found.target_values)):
        for x, y in zip(ours, own, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_terms_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits, aux = torch.randn(2, 2, 5, 9, generator=generator)
    keys, own, values, own_values = torch.randn(4, 3, 2, 5, 7, generator=generator)
    labels = torch.randint(9, (2, 5), generator=generator)
    errors = [(a - b).abs().mean() for a, b in zip([*keys, *values], [*own, *own_values], strict=True)]
    entropy = sum(F.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) for x in (logits, aux))
    z = sum(x[:, :-1].logsumexp(-1).square().mean() for x in (logits, aux))
    parts = (list(keys), list(values)), (list(own), list(own_values))
    torch.testing.assert_close(kv_prediction_loss(logits, aux, labels, *parts), entropy + sum(errors))
    found = kv_prediction_loss(logits, aux, labels, *parts, kv_weight=0.5, z_weight=1e-2)
    torch.testing.assert_close(found, entropy + 0.5 * sum(errors) + 1e-2 * z)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left):
    base, auxiliary, ids = model(3, 4, 2), model(2, 2, 1, seed=1), tokens(1)
    made = KVPredictionModel(base, auxiliary, z_weight=1e-3)
    padding = torch.zeros(1, 5, dtype=torch.long)
    sides = (lambda x: [padding, x]) if left else (lambda x: [x, padding])
    padded = torch.cat(sides(ids), 1)
    mask = torch.cat(sides(torch.ones_like(ids)), 1)
    with torch.no_grad():
        expected = made(ids, labels=ids)
        found = made(padded, mask, labels=padded)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_golden_operations():
    base, auxiliary = BlockSizes(1000, (10, 10)), BlockSizes(300, (10,))
    assert ttft_flops(5, base) == 12000
    assert ttft_flops(5, base, auxiliary, [(10, 10)] * 2) == 10400
    ratio = ttft_flops(10**9, base, auxiliary, [(10, 10)] * 2) / ttft_flops(10**9, base)
    assert ratio == pytest.approx(0.5, abs=1e-5)


def test_sizes_of_smollm2(smollm2):
    found = block_sizes(smollm2.model)
    assert found.attention_widths == (576,) * 30
    assert found.parameters == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)


@torch.no_grad()
def test_smollm2_read_by_itself(smollm2):
    base = copy.deepcopy(smollm2.model)
    made = identity(base, smollm2.model)
    ids = smollm2.tokenizer("The garbage collector frees objects that are part of", return_tensors="pt").input_ids
    found = base(ids[:, -1:], past_key_values=made.predicted_cache(ids[:, :-1])).logits[:, -1]
    torch.testing.assert_close(found, smollm2.model(ids).logits[:, -1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("layer_map", ([8], [8, 8], [1, 1], [0])),
        ("layer_map", ([8], [8, 8], [1, 1], [0, 1])),
        ("layer_map", ([8], [8, 8], [1, 1], [0, -1])),
        ("base_heads", ([8], [8, 8], [1, 3], [0, 0])),
        ("base_heads", ([8], [8, 8], [1], [0, 0])),
    ],
)
def test_misuse_of_the_predictor_is_refused(name, arguments):
    with pytest.raises(ValueError, match=name):
        KVPredictor(*arguments)


def test_weights_for_another_layer_map_are_refused():
    made, same, other = (KVPredictor([8] * 2, [8] * 3, [2] * 3, layers) for layers in ([0, 0, 1], [0, 0, 1], [0, 1, 1]))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    same.load_state_dict(state)
    assert torch.equal(same.keys[0].weight, made.keys[0].weight)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="layer map"):
        other.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


XGLM = {"d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4, "vocab_size": 60}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("phi", {"qk_layernorm": True}),
        ("glm", {}),
        ("cohere", {}),
        ("olmo", {"clip_qkv": 100.0}),
        ("xglm", XGLM),
    ],
)
def test_bases_whose_keys_are_made_otherwise_are_refused(kind, options):
    shape = SHAPE | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(kind, pad_token_id=0, **(options if kind == "xglm" else shape | options))
    base, auxiliary = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    with pytest.raises(ValueError, match="model must be"):
        KVPredictionModel(base, auxiliary)
    assert all(p.requires_grad for p in base.parameters())


def test_misuse_of_the_model_is_refused(minilm):
    base, auxiliary = model(3, 4, 2), model(2, 2, 1)
    other = LlamaForCausalLM(LlamaConfig(**(SHAPE | {"vocab_size": 61}), num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ValueError, match="auxiliary"):
        KVPredictionModel(base, other)
    with pytest.raises(ValueError, match="predictor"):
        KVPredictionModel(base, auxiliary, KVPredictor([8, 9], [16] * 3, [2] * 3, [0, 0, 1]))
    for weights in ({"kv_weight": -1.0}, {"z_weight": math.nan}):
        with pytest.raises(ValueError, match=next(iter(weights))):
            KVPredictionModel(base, auxiliary, **weights)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        KVPredictionModel(base, auxiliary).generate(tokens(1, 1))
    with pytest.raises(ValueError, match="k_proj"):
        KVPredictionModel(minilm.model, minilm.model)
    for keep in ([], [1, 2], [0, 0], [0, 3]):
        with pytest.raises(ValueError, match="keep"):
            layer_pruned_copy(base, keep)
    with pytest.raises(ValueError, match="n_aux"):
        default_layer_map(3, 4)
    with pytest.raises(ValueError, match="tokens"):
        ttft_flops(0, BlockSizes(1, (1,)))


@pytest.mark.parametrize("number", [2.5, True])
def test_numbers_that_are_not_whole_are_refused(number):
    for call, name in (
        (lambda: default_layer_map(4, number), "n_aux"),
        (lambda: pruned_layer_map(4, [0, number]), "keep"),
        (lambda: KVPredictor([8] * 2, [8], [2], [number]), "layer_map"),
        (lambda: KVPredictor([8], [8], [number], [0]), "base_heads"),
        (lambda: KVPredictor([8], [number], [1], [0]), "base_dims"),
        (lambda: ttft_flops(number, BlockSizes(1, (1,))), "tokens"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be|check"):
            call()
    with pytest.raises(ValueError, match="base_heads must be"):
        KVPredictor([8], [8], [0], [0])
