import copy
import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, DynamicCache, LlamaConfig

from fairtrial.methods.kvcache import (
    RotateKVCache,
    calibrate_channel_order,
    fuse_rotatekv,
    quantize_per_token,
    rotate_keys,
    sink_tokens,
)
from fairtrial.methods.kvcache.rotary import Rotary
from fairtrial.methods.quantization import hadamard_transform

F64 = torch.float64
ROWS = torch.tensor([[0.1, -0.4, 0.9, 0.3], [1.0, 2.0, 3.0, 4.0]], dtype=F64)
CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, vocab_size=32)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rotation():
    x = torch.tensor([8, 0.1, -0.2, 0.3], dtype=F64)
    torch.testing.assert_close(
        rotate_keys(x.view(1, 1, 1, 4), 1).flatten(), torch.tensor([4.1, 3.7, 4.0, 4.2], dtype=F64)
    )
    heads = torch.stack([x[:2], x[2:]]).view(1, 2, 1, 2)  # the same channels, in two heads
    torch.testing.assert_close(rotate_keys(heads, 2).flatten(), torch.tensor([4.1, 3.7, 4.0, 4.2], dtype=F64))
    keys = normal(2, 6, 5, 8)
    for head_group in (1, 2):
        rotated = rotate_keys(keys, head_group)
        torch.testing.assert_close(rotate_keys(rotated, head_group), keys)
        torch.testing.assert_close(rotated.norm(dim=(1, 3)), keys.norm(dim=(1, 3)))


@pytest.mark.parametrize(
    ("bits", "clip", "expected"),
    [
        (2, 1.0, [[0, -0.433333, 0.866667, 0.433333], [1, 2, 3, 4]]),
        (2, 0.8, [[0, -0.346667, 0.693333, 0.346667], [0.8, 1.6, 3.2, 3.2]]),
        (4, 1.0, [[0.086667, -0.433333, 0.866667, 0.26], [1, 2, 3, 4]]),
    ],
)
def test_golden_levels(bits, clip, expected):
    found = quantize_per_token(ROWS, bits, 4, clip).dequantize(F64)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)


def test_three_bits_have_eight_levels():
    x = 0.5 * torch.arange(-2.0, 6.0)[None]
    torch.testing.assert_close(quantize_per_token(x, 3, 8).dequantize(), x)


@pytest.mark.parametrize("value", [0.0, 3.0, -700.0])
def test_a_group_of_equal_entries_keeps_its_value(value):
    for held_in in (torch.float32, torch.float16, torch.bfloat16):
        found = quantize_per_token(torch.full((1, 8), value), 2, 4, held_in=held_in).dequantize()
        torch.testing.assert_close(found, torch.full((1, 8), value), rtol=4e-3, atol=1e-3)


def test_the_error_falls_with_the_bits():
    x = normal(200, 64)
    errors = [(quantize_per_token(x, bits, 32).dequantize() - x).square().mean().item() for bits in range(1, 9)]
    assert all(b < 0.4 * a for a, b in pairwise(errors))


# none, rotation, rotation and reordering, by clip and group size
@pytest.mark.parametrize(
    ("group_size", "clip", "expected"),
    [
        (32, 1.0, (0.623, 0.430, 0.201)),
        (32, 0.8, (0.567, 0.315, 0.154)),
        (128, 1.0, (1.084, 0.640, 0.640)),
        (128, 0.8, (1.091, 0.446, 0.446)),
    ],
)
def test_rotation_and_reordering_of_keys_with_outliers(group_size, clip, expected):
    keys = normal(1024, 128)
    keys[:, 5] += 12
    keys[:, 40] -= 9
    keys[:, 77] *= 6
    rotated = hadamard_transform(keys)
    order = rotated.sum(0).argsort()
    for x, error in zip((keys, rotated, rotated[:, order]), expected, strict=True):
        found = (quantize_per_token(x, 2, group_size, clip).dequantize() - x).square().mean().item()
        assert found == pytest.approx(error, rel=0.04)


def test_order_is_that_of_the_sums():
    sums = torch.tensor([4.0, -3.0, 1.0, 7.0])
    order = sums.argsort(stable=True)
    assert order.tolist() == [1, 2, 0, 3]
    assert torch.equal(sums[order][order.argsort()], sums)


@pytest.mark.parametrize("head_group", [None, 1])
def test_calibration_sums_the_rotated_keys_before_their_rotary_embeddings(small_gpt, head_group):
    model, batches = (
        small_gpt.model,
        [torch.randint(256, (n, 40), generator=torch.Generator().manual_seed(n)) for n in (1, 2)],
    )
    seen = []
    handle = model.model.layers[2].self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        orders = calibrate_channel_order(model, batches, head_group)
    finally:
        handle.remove()
    keys = torch.cat([x.flatten(0, 1) for x in seen]).view(1, -1, 2, 32).transpose(1, 2)
    sums = rotate_keys(keys, head_group or 2).transpose(1, 2).flatten(2).sum((0, 1), dtype=F64)
    assert orders.shape == (4, 64)
    assert (sums[orders[2]].diff() > -1e-3).all()


def test_sinks_are_the_tokens_of_the_largest_entries():
    hidden = 0.1 * normal(2, 9, 5)
    hidden[0, 3, [0, 2]], hidden[0, 7, 1] = 50.0, -40.0
    hidden[1, 4] = 30.0
    assert sink_tokens(hidden, 3).tolist() == [[3, 7], [4, 4]]
    assert sink_tokens(hidden[:, :1], 1000).tolist() == [[0], [0]]


def handed(cache, tokens, batch=1, start=0):
    """Hand tokens to each layer; returns them, and what came back, by layer."""
    given = [[normal(batch, 2, tokens, 16, seed=start + 2 * i + j) for j in (0, 1)] for i in range(2)]
    return given, [cache.update(*given[i], i) for i in range(2)]


def test_sinks_are_exact_and_other_tokens_are_not():
    cache = RotateKVCache(CONFIG, sink_indices=[0, 4])
    given, found = handed(cache, 9)
    sinks, others = [0, 4], [1, 2, 3, 5, 6, 7, 8]
    for layer, returned in zip(given, found, strict=True):
        for x, y in zip(layer, returned, strict=True):
            assert torch.equal(x[:, :, sinks], y[:, :, sinks])
            assert (x[:, :, others] - y[:, :, others]).abs().amax((0, 1, 3)).min() > 0.1


def test_sinks_that_are_cropped_are_gone():
    cache = RotateKVCache(CONFIG, sink_indices=[2, 4])
    given, (before, _) = handed(cache, 6)
    cache.crop(-3)
    again, (after, _) = handed(cache, 4, start=50)
    assert torch.equal(after[0][:, :, :3], before[0][:, :, :3])
    assert torch.equal(after[0][:, :, 2], given[0][0][:, :, 2])
    assert (after[0][:, :, 3:] - again[0][0]).abs().amax((0, 1, 3)).min() > 0.1
    cache.crop(-6)  # and the other one
    again, (after, _) = handed(cache, 4, start=90)
    assert (after[0][:, :, 1:] - torch.cat([given[0][0][:, :, 1:1], again[0][0]], 2)[:, :, :4]).isfinite().all()
    assert (after[1][:, :, 1:] - again[0][1]).abs().amax((0, 1, 3)).min() > 0.1


def test_what_is_returned_is_the_quantised_rotation_undone():
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    cache = RotateKVCache(CONFIG, bits=3, clip=0.9, group_size=8, order=order, sinks=0)
    given, found = handed(cache, 7)
    rotary = Rotary(CONFIG)
    for i in range(2):
        keys = rotate_keys(rotary.take_off(given[i][0]), 2).transpose(1, 2).flatten(2)[..., order[i]]
        keys = quantize_per_token(keys, 3, 8, 0.9, held_in=torch.float16).dequantize()[..., order[i].argsort()]
        keys = rotary.put_on(rotate_keys(keys.view(1, 7, 2, 16).transpose(1, 2), 2))
        torch.testing.assert_close(found[i][0], keys)
        values = hadamard_transform(given[i][1]).transpose(1, 2).flatten(2)
        values = quantize_per_token(values, 3, 8, 0.9, held_in=torch.float16).dequantize()
        torch.testing.assert_close(found[i][1], hadamard_transform(values.view(1, 7, 2, 16).transpose(1, 2)))


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 8), (4, 32), (8, 16)])
def test_bytes_are_those_of_the_arithmetic(bits, group_size):
    cache = RotateKVCache(CONFIG, bits=bits, group_size=group_size, sink_indices=[0, 3])
    handed(cache, 50)
    codes, scales = 32 * bits // 8, 2 * 2 * 32 // group_size
    sinks = 2 * 4 + 2 * 2 * 32 * 4
    assert cache.nbytes == 2 * (50 * 2 * (codes + scales) + sinks)


def test_fused_weights_give_the_original_logits(small_gpt):
    model = copy.deepcopy(small_gpt.model).double()  # so that codes are rounded alike
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    orders = calibrate_channel_order(model, [ids])
    fused = fuse_rotatekv(copy.deepcopy(model), orders)
    expected, found, quantised = [], [], []
    runs = (
        (expected, model, DynamicCache()),
        (found, fused, RotateKVCache(model.config, bits=16, order=orders, fused=True)),
        (quantised, fused, RotateKVCache(model.config, bits=4, order=orders, fused=True)),
        (quantised, model, RotateKVCache(model.config, bits=4, order=orders)),
    )
    for logits, run, cache in runs:
        with torch.no_grad(), cache.attached_to(run) if isinstance(cache, RotateKVCache) else torch.no_grad():
            logits.append(run(ids[:, :20], past_key_values=cache).logits)
            logits.append(run(ids[:, 20:], past_key_values=cache).logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(quantised[:2], quantised[2:], rtol=0, atol=1e-4)


def test_biases_are_fused_too():
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=64,
        vocab_size=32, attention_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = normal(*p.shape)
    ids = torch.arange(20)[None]
    orders = calibrate_channel_order(model, [ids])
    fused = fuse_rotatekv(copy.deepcopy(model), orders)
    cache = RotateKVCache(config, bits=16, order=orders, fused=True, sinks=0)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids, past_key_values=cache).logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"head_dim": 8}),  # normalises keys
        ("olmo", {"clip_qkv": 100.0}),
        ("cohere", {}),  # turns neighbouring channels together
        ("bitnet", {}),  # normalises what o_proj is handed
    ],
)
def test_models_that_would_not_be_the_same_are_not_fused(kind, options):
    config = AutoConfig.for_model(
        kind, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=32,
        vocab_size=64, pad_token_id=0, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="model must be"):
        fuse_rotatekv(model, torch.arange(16).expand(2, -1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_rounding_smollm2_is_unchanged(smollm2):
    model, ids = smollm2.model, torch.randint(1000, 20000, (1, 20), generator=torch.Generator().manual_seed(0))
    cache = RotateKVCache(model.config, bits=16)
    assert cache.head_group == 1  # three heads
    with torch.no_grad():
        plain = model(ids).logits
        with cache.attached_to(model):
            first, rest = (model(part, past_key_values=cache).logits for part in (ids[:, :16], ids[:, 16:]))
    torch.testing.assert_close(torch.cat([first, rest], 1), plain, rtol=0, atol=1e-3)  # of logits up to 30


def test_misuse_is_refused_with_the_argument_named(small_gpt, minilm):
    nan = math.nan
    for arguments in (
        {"bits": 0}, {"bits": 9}, {"clip": 0.0}, {"clip": nan}, {"clip": 1.5}, {"group_size": 24}, {"group_size": 0},
        {"head_group": 3}, {"sinks": -1}, {"sink_indices": [-1]}, {"order": torch.zeros(2, 32, dtype=torch.long)},
        {"order": torch.arange(32)[None]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(arguments))):
            RotateKVCache(CONFIG, **arguments)
    with pytest.raises(ValueError, match="head_group"):
        rotate_keys(normal(1, 3, 4, 64), 3)
    with pytest.raises(ValueError, match="rotary"):
        RotateKVCache(BertConfig())
    with pytest.raises(ValueError, match="attached_to"):
        handed(RotateKVCache(CONFIG), 4)
    with pytest.raises(ValueError, match="layers"):
        RotateKVCache(CONFIG).attached_to(small_gpt.model)
    with pytest.raises(ValueError, match="model"):
        RotateKVCache(CONFIG).attached_to(minilm.model)
    with pytest.raises(ValueError, match="calibration"):
        calibrate_channel_order(small_gpt.model, [])
    with pytest.raises(ValueError, match="order"):
        fuse_rotatekv(small_gpt.model, torch.zeros(4, 64, dtype=torch.long))
    for arguments in ({"bits": 9, "group_size": 4}, {"bits": 2, "group_size": 3}):
        with pytest.raises(ValueError):
            quantize_per_token(ROWS, **arguments)
    with pytest.raises(ValueError, match="k "):
        sink_tokens(normal(1, 2, 3), 0)


@pytest.mark.parametrize("number", [2.5, 2.0, True])
def test_numbers_that_are_not_whole_are_refused(number):
    for name in ("bits", "group_size", "head_group", "sinks"):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be|check"):
            RotateKVCache(CONFIG, **{name: number})
    with pytest.raises((ValueError, TypeError), match="sink_indices must be|check"):
        RotateKVCache(CONFIG, sink_indices=[0, number])
    for call, name in (
        (lambda: quantize_per_token(ROWS, number, 4), "bits"),
        (lambda: quantize_per_token(ROWS, 2, number), "group_size"),
        (lambda: sink_tokens(normal(1, 2, 3), number), "k"),
        (lambda: rotate_keys(normal(1, 2, 3, 4), number), "head_group"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be|check"):
            call()


def test_cosines_are_made_once_for_all_layers(monkeypatch):
    made, cos = [], torch.Tensor.cos
    cache = RotateKVCache(CONFIG, sinks=0)
    handed(cache, 6)
    monkeypatch.setattr(torch.Tensor, "cos", lambda angles: made.append(angles.shape) or cos(angles))
    handed(cache, 1)
    assert made == [(1, 16), (7, 16)]


def test_cosines_do_not_pile_up():
    rotary = Rotary(CONFIG)
    for tokens in range(1, 9):
        rotary.put_on(normal(1, 2, tokens, 16))
    assert len(rotary._known) == 2
