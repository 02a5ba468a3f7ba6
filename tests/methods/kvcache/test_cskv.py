import copy
import io
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from fairtrial.methods.kvcache import (
    CSKVCache,
    CSKVProjection,
    asvd_factorize,
    cskv_cache,
    enable_cskv,
    factorize_cskv,
    fake_quantize_keys,
    fake_quantize_values,
    train_cskv,
)
from fairtrial.methods.kvcache.cskv import attention_inputs

F64 = torch.float64
ROWS = torch.tensor([[0.1, -0.4, 0.9, 0.3], [1.0, 2.0, 3.0, 4.0]], dtype=F64)
IDS = torch.randint(97, 123, (2, 70), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@torch.no_grad()
def read(model, cache, ids, *, prompt=20):
    """Logits of a prompt and of single tokens after it."""
    with cache.attached_to(model):
        parts = [ids[:, :prompt], *(ids[:, i : i + 1] for i in range(prompt, ids.shape[1]))]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def test_golden_errors_of_the_decompositions():
    n = torch.arange(48, dtype=F64).view(6, 8)
    weight = (1.3 * n + 0.1 * n**1.5).sin()
    a = torch.ones(8, dtype=F64)
    a[2] = 4
    scale = a.sqrt()
    for means, plain, weighted in ((None, 1.116287, 1.359204), (a, 1.183973, 1.223794)):
        down, up = asvd_factorize(weight, means, 3)
        assert (up @ down - weight).norm().item() == pytest.approx(plain, abs=1e-5)
        assert ((up @ down - weight) * scale).norm().item() == pytest.approx(weighted, abs=1e-5)


def test_the_plain_decomposition_is_the_best_there_is():
    weight = normal(6, 9)
    down, up = asvd_factorize(weight, None, 4)
    beyond = torch.linalg.svdvals(weight)[4:].norm()
    torch.testing.assert_close((up @ down - weight).norm(), beyond)
    for means in (torch.full((9,), 3.0, dtype=F64), torch.zeros(9, dtype=F64)):
        same = asvd_factorize(weight, means, 4)
        torch.testing.assert_close(same[1] @ same[0], up @ down)
    whole = asvd_factorize(weight, normal(9, seed=1).abs(), 6)
    torch.testing.assert_close(whole[1] @ whole[0], weight)


def test_a_projection_of_full_rank_is_the_layer_with_its_bias():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(9, 6).double()
    x = normal(2, 5, 9)
    torch.testing.assert_close(CSKVProjection(linear, 6)(x), linear(x))


def test_golden_levels():
    expected = torch.tensor([[0, -0.433333, 0.866667, 0.433333], [1, 2, 3, 3]], dtype=F64)
    torch.testing.assert_close(fake_quantize_values(ROWS[None], 2)[0], expected, atol=1e-6, rtol=0)
    keys = torch.tensor([[0.1, -0.5, 0.9, 0.3], [1.0, 2.0, 3.0, 4.0]], dtype=F64)
    expected = torch.tensor([[0, -0.833333, 0.7, 0], [0.9, 1.666667, 2.1, 3.7]], dtype=F64)
    torch.testing.assert_close(fake_quantize_keys(keys[None], 2, 2)[0], expected, atol=1e-6, rtol=0)


def test_quantisers_group_windows_and_heads():
    u = normal(2, 8, 6)
    apart = [fake_quantize_keys(u[i : i + 1, j : j + 4], 3, 4) for i in range(2) for j in (0, 4)]
    torch.testing.assert_close(
        fake_quantize_keys(u, 3, 4), torch.cat([torch.cat(apart[:2], 1), torch.cat(apart[2:], 1)])
    )
    halves = [fake_quantize_values(u[..., j : j + 3].contiguous(), 3) for j in (0, 3)]
    torch.testing.assert_close(fake_quantize_values(u, 3, 2), torch.cat(halves, -1))


def test_the_gradient_passes_between_the_outermost_levels():
    u = ROWS[None].clone().requires_grad_()
    weights = torch.arange(1.0, 9.0, dtype=F64).view(1, 2, 4)
    (fake_quantize_values(u, 2) * weights).sum().backward()
    # levels of the first row go from -.4333 to .8667, of the second from 0 to 3; the ends themselves are outside
    torch.testing.assert_close(u.grad, weights * torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]], dtype=F64))


def test_a_window_longer_than_the_text_changes_nothing(small_gpt):
    model = small_gpt.model
    factors = factorize_cskv(model, 0.1, 0.1)
    plain = model(IDS).logits
    torch.testing.assert_close(read(model, CSKVCache(factors, 71), IDS), plain, rtol=0, atol=1e-4)
    assert (read(model, CSKVCache(factors, 70), IDS)[:, :-1] - plain[:, :-1]).abs().max() < 1e-4
    assert (read(model, CSKVCache(factors, 20), IDS) - plain).abs().max() > 0.1


def test_a_prompt_of_a_window_is_compressed(small_gpt):
    cache = CSKVCache(factorize_cskv(small_gpt.model, 0.5, 0.5), window=20)
    read(small_gpt.model, cache, IDS[:, :20])
    layer = cache.layers[1]
    assert layer.keys is None
    assert layer.key_features.shape == layer.value_features.shape == (2, 20, 32)


@pytest.mark.parametrize("bits", [None, 4])
def test_decoding_is_what_the_stored_features_say(small_gpt, bits):
    model, cache = small_gpt.model, CSKVCache(factorize_cskv(small_gpt.model, 0.5, 0.5), 16, bits, bits)
    for length in range(20, 53):
        with torch.no_grad(), cache.attached_to(model):
            start = 0 if length == 20 else length - 1
            model(IDS[:, start:length], past_key_values=cache)
        layer = cache.layers[2]
        assert all(each.get_seq_length() == length for each in cache.layers)
        compressed = 0 if layer.key_features is None else layer.key_features.shape[1]
        assert compressed == length // 16 * 16
        assert (0 if layer.keys is None else layer.keys.shape[2]) == length % 16
    # the features of the full windows, from the inputs as attention saw them, are what was stored step by step
    handed = []
    factors = cache.factors
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: handed.append(kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        model(IDS[:, :48])
    finally:
        handle.remove()
    keys, values = factors.keys[0].compress(handed[0]), factors.values[0].compress(handed[0])
    if bits:
        keys, values = fake_quantize_keys(keys, bits, 16), fake_quantize_values(values, bits, 2)
    first = cache.layers[0]
    found = [first._features(name, bits, 32, torch.float32) for name in ("key", "value")]
    for ours, expected in zip(found, (keys, values), strict=True):
        apart = (ours - expected).abs()
        # with scales in 16 bits a feature between two levels may go to the other one
        assert apart.flatten().quantile(0.99) < 0.02 if bits else apart.max() < 1e-5


def test_in_the_step_that_fills_a_window_its_tokens_are_exact(small_gpt):
    model, plain = small_gpt.model, DynamicCache()
    with torch.no_grad():
        model(IDS[:, :32], past_key_values=plain)
    cache = CSKVCache(factorize_cskv(model, 0.5, 0.5), 16)
    returned = []
    update = cache.layers[0].update
    cache.layers[0].update = lambda *args, **kwargs: returned.append(update(*args, **kwargs)) or returned[-1]
    read(model, cache, IDS[:, :32])
    keys, values = returned[-1]
    torch.testing.assert_close(keys[:, :, 16:], plain.layers[0].keys[:, :, 16:], rtol=0, atol=1e-5)
    torch.testing.assert_close(values[:, :, 16:], plain.layers[0].values[:, :, 16:], rtol=0, atol=1e-5)
    assert (keys[:, :, :16] - plain.layers[0].keys[:, :, :16]).abs().amax((0, 1, 3)).min() > 1e-3


def test_positions_moved_by_a_constant_change_nothing(small_gpt):
    model, factors = small_gpt.model, factorize_cskv(small_gpt.model, 0.5, 0.5)
    logits = []
    for shift in (0, 9):
        cache = CSKVCache(factors, 8)
        with torch.no_grad(), cache.attached_to(model):
            for start, stop in ((0, 20), (20, 21), (21, 30)):
                positions = torch.arange(start, stop)[None] + shift
                out = model(IDS[:, start:stop], past_key_values=cache, position_ids=positions)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("k_bits", "v_bits"), [(None, None), (4, 2), (3, None)])
def test_bytes_are_those_of_the_arithmetic(small_gpt, k_bits, v_bits):
    cache = CSKVCache(factorize_cskv(small_gpt.model, 0.25, 0.75), 16, k_bits, v_bits)
    read(small_gpt.model, cache, IDS[:, :50])
    keys = 16 * 4 if k_bits is None else 16 * k_bits // 8 + 16 * 3 / 16  # a scale and a zero point for 16 tokens
    values = 48 * 4 if v_bits is None else 48 * v_bits // 8 + 2 * 3
    full, rest = 48, 2
    assert cache.nbytes == 2 * (4 * (full * (keys + values) + rest * 4 * (16 + 48 + 2 * 64)) + 50 * 4)


def test_training_rebuilds_keys_and_values_better(small_gpt):
    model = small_gpt.model
    batches = [IDS[:1], IDS[1:, :50]]
    factors = factorize_cskv(model, 0.3, 0.3, batches)
    before = copy.deepcopy(factors.state_dict())
    losses = train_cskv(factors, model, batches, lr=1e-3, steps=40)
    assert losses[-1] < 0.8 * losses[1]
    assert losses[-2] < 0.8 * losses[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in factors.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    with torch.no_grad():  # the loss of the first step is that of the decomposition
        expected = 0.0
        start = factorize_cskv(model, 0.3, 0.3, batches)
        for i, x in enumerate(next(attention_inputs(model, batches))):
            attention = model.model.layers[i].self_attn
            expected += (start.keys[i](x) - attention.k_proj(x)).square().mean().item()
            expected += (start.values[i](x) - attention.v_proj(x)).square().mean().item()
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    quantised = train_cskv(factors, model, batches, lr=1e-3, steps=4, k_bits=4, v_bits=4, window=16)
    assert quantised[0] > losses[-1]
    assert all(math.isfinite(loss) for loss in quantised)


def test_factors_are_saved_by_themselves(small_gpt):
    factors, file = factorize_cskv(small_gpt.model, 0.3, 0.5, [IDS]), io.BytesIO()
    torch.save(factors.state_dict(), file)
    file.seek(0)
    other = factorize_cskv(small_gpt.model, 0.3, 0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    logits = [read(small_gpt.model, CSKVCache(each, 8), IDS[:, :40]) for each in (factors, other)]
    assert torch.equal(*logits)


def test_a_context_that_makes_it_all(small_gpt):
    model = small_gpt.model
    with enable_cskv(model, 1.0, 1.0, window=4) as cache:
        found = model.generate(IDS[:, :20], past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, model.generate(IDS[:, :20], max_new_tokens=10, do_sample=False))


def test_projections_with_a_bias():
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=64,
        vocab_size=128, attention_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = normal(*p.shape).float()
    cache = CSKVCache(factorize_cskv(model, 1.0, 1.0), 8)
    with torch.no_grad():
        torch.testing.assert_close(read(model, cache, IDS[:, :40]), model(IDS[:, :40]).logits, rtol=0, atol=1e-4)


def untrained(kind, layers=2, **options):
    config = AutoConfig.for_model(
        kind, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
        intermediate_size=32, vocab_size=128, pad_token_id=0, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["qwen2", "phi", "stablelm", "olmo"])
def test_models_that_cache_what_k_proj_gives_are_unchanged_at_full_rank(kind):
    model = untrained(kind)
    with torch.no_grad():
        found = read(model, CSKVCache(factorize_cskv(model, 1.0, 1.0), 8), IDS[:, :30])
        torch.testing.assert_close(found, model(IDS[:, :30]).logits, rtol=0, atol=1e-4)
    factorize_cskv(model.bfloat16(), 1.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"head_dim": 8}),
        ("olmo2", {}),
        ("phi", {"qk_layernorm": True}),
        ("stablelm", {"qk_layernorm": True}),
        ("cohere", {}),
        ("glm", {"head_dim": 8}),
    ],
)
def test_models_that_cache_other_keys_are_refused(kind, options):
    with pytest.raises(ValueError, match="k_proj gives"):
        factorize_cskv(untrained(kind, **options))


def test_models_that_clip_keys_are_refused_by_name():
    with pytest.raises(ValueError, match="clip_qkv = 100"):
        factorize_cskv(untrained("olmo", clip_qkv=100.0))


def test_factors_of_another_model_are_not_trained(small_gpt):
    for layers in (2, 4):
        factors = factorize_cskv(untrained("llama", layers), 0.5, 0.5)
        before = copy.deepcopy(factors.state_dict())
        with pytest.raises(ValueError, match="factors"):
            train_cskv(factors, small_gpt.model, [IDS])
        assert all(torch.equal(tensor, before[name]) for name, tensor in factors.state_dict().items())


def test_at_full_rank_smollm2_is_unchanged(smollm2):
    model, ids = smollm2.model, torch.randint(1000, 20000, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits
        found = read(model, CSKVCache(factorize_cskv(model, 1.0, 1.0), 4), ids, prompt=18)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)  # of logits up to 30


def test_cropping_into_a_full_window_is_refused_and_leaves_all_layers(small_gpt):
    cache = CSKVCache(factorize_cskv(small_gpt.model, 0.5, 0.5), 16)
    read(small_gpt.model, cache, IDS[:, :37])
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-6)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [34] * 4
    logits = [read(small_gpt.model, cache, IDS[:, 34:37], prompt=1)]
    other = CSKVCache(cache.factors, 16)
    logits.append(read(small_gpt.model, other, IDS[:, :37])[:, 34:])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_misuse_is_refused_with_the_argument_named(small_gpt, minilm):
    model = small_gpt.model
    for arguments in ({"k_density": 0.0}, {"v_density": 1.1}, {"k_density": math.nan}, {"v_density": 0.001}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            factorize_cskv(model, **arguments)
    factors = factorize_cskv(model, 0.25, 0.25)
    for arguments, name in (({"window": 0}, "window"), ({"k_bits": 0}, "bits"), ({"v_bits": 9}, "bits")):
        with pytest.raises(ValueError, match=name):
            CSKVCache(factors, **arguments)
    for rank in (0, 7):
        with pytest.raises(ValueError, match="rank"):
            asvd_factorize(normal(6, 9), None, rank)
    with pytest.raises(ValueError, match="act_abs_mean"):
        asvd_factorize(normal(6, 9), torch.full((9,), math.nan, dtype=F64), 2)
    with pytest.raises(ValueError):
        factorize_cskv(minilm.model)
    for arguments in ({"lr": 0.0}, {"lr": math.inf}, {"lr": math.nan}, {"steps": 0}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            train_cskv(factors, model, [IDS], **arguments)
    with pytest.raises(ValueError, match="batches"):
        train_cskv(factors, model, [])
    with pytest.raises(ValueError, match="batches"):
        train_cskv(factors, model, [IDS[:, :10]], k_bits=4)
    with pytest.raises(ValueError, match="attached_to"):
        model(IDS, past_key_values=CSKVCache(factors))
    with pytest.raises(ValueError, match="u must"):
        fake_quantize_keys(normal(1, 5, 4), 2, 2)
    with pytest.raises(ValueError, match="heads"):
        fake_quantize_values(normal(1, 5, 4), 2, 3)
    cache = cskv_cache(model, [], steps=0)
    cache.layers[0].seen = (torch.zeros(1, 3, 128), torch.arange(3)[None])
    with pytest.raises(ValueError, match="key_states"):
        cache.update(torch.zeros(1, 2, 4, 32), torch.zeros(1, 2, 4, 32), 0)


@pytest.mark.parametrize("number", [2.5, True])
def test_numbers_that_are_not_whole_are_refused_before_anything_is_done(small_gpt, number):
    model, factors = small_gpt.model, factorize_cskv(small_gpt.model, 0.25, 0.25)
    u = normal(1, 4, 2)
    for call, name in (
        (lambda: CSKVCache(factors, number), "window"),
        (lambda: CSKVCache(factors, 4, number), "bits"),
        (lambda: asvd_factorize(normal(6, 9), None, number), "rank"),
        (lambda: train_cskv(factors, model, [IDS], steps=number), "steps"),
        (lambda: fake_quantize_keys(u, 2, number), "window"),
        (lambda: fake_quantize_values(u, number), "bits"),
        (lambda: fake_quantize_values(u, 2, number), "heads"),
        (lambda: cskv_cache(nn.Linear(1, 1), [IDS], steps=number), "steps"),
        (lambda: cskv_cache(nn.Linear(1, 1), [IDS], v_bits=number), "bits"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be|check"):
            call()
    with pytest.raises(ValueError, match="alpha"):
        asvd_factorize(normal(6, 9), torch.ones(9, dtype=F64), 2, math.nan)


@torch.no_grad()
def test_a_copy_goes_on_by_itself_with_the_same_factors(small_gpt):
    model, following = small_gpt.model, IDS[:, 37:38]
    cache = CSKVCache(factorize_cskv(model, 0.5, 0.5), 16, 4, 4)
    read(model, cache, IDS[:, :37])
    copied = copy.deepcopy(cache)
    assert copied.factors is cache.factors
    assert all(layer.cache is copied for layer in copied.layers)
    found = read(model, copied, following)
    assert (copied.get_seq_length(), cache.get_seq_length()) == (38, 37)
    assert torch.equal(found, read(model, cache, following))


@torch.no_grad()
def test_inputs_of_a_call_that_failed_are_forgotten_on_leaving(small_gpt):
    model, cache = small_gpt.model, CSKVCache(factorize_cskv(small_gpt.model, 0.5, 0.5), 16)
    states = torch.zeros(2, 2, 5, 32)
    projection = model.model.layers[0].self_attn.k_proj
    handle = projection.register_forward_pre_hook(lambda module, args: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError), cache.attached_to(model):
            model(IDS[:, :5], past_key_values=cache)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="attached_to"):
        cache.update(states, states, 0)
