import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, DynamicCache, LlamaConfig, MistralConfig

from fairtrial.methods.kvcache import (
    XKVCache,
    cross_layer_svd,
    group_layers,
    minicache_merge,
    reconstruct,
    slerp,
    subspace_overlap,
    xkv_bytes,
)
from fairtrial.methods.kvcache.held import together
from fairtrial.methods.kvcache.rotary import Rotary

F64 = torch.float64
CONFIG = LlamaConfig(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, vocab_size=32)


def waves():
    """Two layers of 2 heads, 6 tokens and 3 channels."""
    a = torch.arange(36, dtype=F64).view(1, 2, 6, 3)
    return [(0.7 * a + shift).sin() + 0.1 * (0.01 * a**2 + shift).cos() for shift in (0.0, 0.4)]


def approximated(layers, rank):
    coefficients, bases = cross_layer_svd(layers, rank)
    return [reconstruct(coefficients, basis, layer.shape[1]) for basis, layer in zip(bases, layers, strict=True)]


def relative_error(layers, found):
    x, y = torch.cat(layers, 1), torch.cat(found, 1)
    return ((x - y).norm() / x.norm()).item()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("rank", "error"), [(1, 0.545956), (2, 0.046965), (4, 0.010339), (6, 0.0)])
def test_golden_errors(rank, error):
    assert relative_error(waves(), approximated(waves(), rank)) == pytest.approx(error, abs=1e-6)


def test_golden_reconstruction():
    first, second = approximated(waves(), 2)
    torch.testing.assert_close(
        first[0, 0, 0], torch.tensor([0.022245, 0.696263, 1.061124], dtype=F64), atol=1e-6, rtol=0
    )
    expected = torch.tensor([-0.970060, -0.753192, -0.171805], dtype=F64)
    torch.testing.assert_close(second[0, 1, 5], expected, atol=1e-6, rtol=0)


def test_golden_error_of_two_separate_decompositions():
    found = [approximated([layer], 1)[0] for layer in waves()]
    assert relative_error(waves(), found) == pytest.approx(0.529318, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 14), layers=st.integers(1, 3), data=st.data())
def test_the_error_is_what_the_singular_values_beyond_the_rank_leave(seed, tokens, layers, data):
    x = [normal(2, 2, tokens, 3, seed=seed + i) for i in range(layers)]
    rank = data.draw(st.integers(1, min(tokens, 6 * layers)))
    found = approximated(x, rank)
    for row in range(2):
        joined = torch.cat([together(layer)[row] for layer in x], -1)
        beyond = torch.linalg.svdvals(joined)[rank:].norm()
        error = torch.cat([(a - b)[row] for a, b in zip(x, found, strict=True)]).norm()
        torch.testing.assert_close(error, beyond, rtol=1e-6, atol=1e-7)


def test_bases_are_orthonormal_over_the_group_and_coefficients_orthogonal():
    for tokens in (5, 20):
        coefficients, bases = cross_layer_svd([normal(1, 2, tokens, 3, seed=i) for i in range(2)], 4)
        basis = torch.cat(bases, -1)[0]
        torch.testing.assert_close(basis @ basis.mT, torch.eye(4, dtype=F64))
        gram = coefficients[0].mT @ coefficients[0]
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-10, rtol=0)
        assert (gram.diagonal().diff() < 0).all()  # the largest singular value first


def test_a_group_of_rank_gr_is_no_worse_than_layers_of_rank_r():
    layers = [normal(1, 2, 30, 4, seed=i) for i in range(3)]
    alone = [approximated([layer], 2)[0] for layer in layers]
    assert relative_error(layers, approximated(layers, 6)) <= relative_error(layers, alone)


def test_of_duplicated_layers_a_rank_is_worth_what_it_is_for_one():
    layer = normal(1, 2, 30, 4)
    once, twice = approximated([layer], 3), approximated([layer, layer], 3)
    assert relative_error([layer] * 2, twice) == pytest.approx(relative_error([layer], once), abs=1e-9)


def test_permuted_tokens_have_permuted_reconstructions():
    layers, order = [normal(1, 2, 9, 4, seed=i) for i in range(2)], torch.randperm(9, generator=torch.Generator())
    for found, permuted in zip(approximated(layers, 3), approximated([x[:, :, order] for x in layers], 3), strict=True):
        torch.testing.assert_close(found[:, :, order], permuted)


def test_layers_of_nothing_are_cut_to_nothing():
    for tokens in (3, 30):
        for found in approximated([torch.zeros(1, 2, tokens, 4)] * 2, 2):
            assert torch.equal(found, torch.zeros(1, 2, tokens, 4))


def test_groups():
    assert group_layers(10, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert group_layers(10, 4, 2, 7) == [[2, 3, 4, 5], [6]]
    for bad in ((10, 0), (10, 4, 7, 7), (10, 4, 0, 11), (10, 4, -1)):
        with pytest.raises(ValueError):
            group_layers(*bad)


def test_overlap_of_subspaces():
    x = normal(2, 2, 40, 4)
    torch.testing.assert_close(subspace_overlap(x, x, 5), torch.ones(2, dtype=F64))
    mixed = torch.einsum("bhtd,de->bhte", x, normal(4, 4, seed=1))  # the same columns, mixed within heads
    torch.testing.assert_close(subspace_overlap(x, mixed, 8), torch.ones(2, dtype=F64))
    far = torch.linalg.qr(normal(40, 16)).Q.T.view(1, 4, 4, 40).transpose(2, 3)  # 16 directions
    torch.testing.assert_close(
        subspace_overlap(far[:, :2], far[:, 2:], 8), torch.zeros(1, dtype=F64), atol=1e-12, rtol=0
    )
    many = torch.cat(
        [subspace_overlap(normal(8, 1, 50, 10, seed=s), normal(8, 1, 50, 10, seed=s + 50), 10) for s in range(5)]
    )
    assert many.mean().item() == pytest.approx(10 / 50, rel=0.1)


def test_slerp():
    e1, e2 = torch.eye(3, dtype=F64)[:2]
    half = torch.tensor([0.5**0.5, 0.5**0.5, 0], dtype=F64)
    torch.testing.assert_close(slerp(e1, 7 * e2), half)
    torch.testing.assert_close(slerp(e1, e2, 1 / 3), torch.tensor([math.cos(math.pi / 6), 0.5, 0], dtype=F64))
    torch.testing.assert_close(slerp(e1, e1), e1)
    x, y, _ = minicache_merge(e1.view(1, 1, 1, 3), 7 * e2.view(1, 1, 1, 3), gamma=0.0)
    torch.testing.assert_close(x.flatten(), half)
    torch.testing.assert_close(y.flatten(), 7 * half)


def test_minicache_keeps_the_tokens_that_differ_most():
    angles = torch.tensor([0.1, 0.2, 1.9, 2.0], dtype=F64)
    x = torch.tensor([1.0, 0], dtype=F64).expand(1, 1, 4, 2)
    y = 3 * torch.stack([angles.cos(), angles.sin()], -1).view(1, 1, 4, 2)
    left, right, kept = minicache_merge(x, y, gamma=0.1)
    assert kept.flatten().tolist() == [False, False, True, True]
    torch.testing.assert_close(left[kept], x[kept])
    torch.testing.assert_close(right[kept], y[kept])
    torch.testing.assert_close(right.norm(dim=-1), y.norm(dim=-1))


def test_rotary_embeddings_come_off_exactly(small_gpt):
    config = small_gpt.model.config
    rotary, keys = Rotary(config), normal(2, 2, 50, 32).float()
    cos, sin = small_gpt.model.model.rotary_emb(keys, torch.arange(50)[None] + 7)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _, turned = apply_rotary_pos_emb(keys, keys, cos, sin)
    torch.testing.assert_close(rotary.take_off(turned, 7), keys, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotary.put_on(keys, 7), turned, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_other_rotary_embeddings_come_off_and_go_on_again(rope):
    rotary, keys = Rotary(LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)), normal(1, 2, 9, 16)
    turned = rotary.put_on(keys)
    assert (turned - keys).abs().max() > 0.1
    torch.testing.assert_close(rotary.take_off(turned), keys, rtol=0, atol=1e-6)


def filled(cache, prompt, after, batch=1, seed=0):
    """Hand the cache a prompt and single tokens; returns all that it was handed, by layer."""
    handed = [[normal(batch, 2, prompt + after, 16, seed=seed + 10 * i + j).float() for j in (0, 1)] for i in range(4)]
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + after))]:
        for i, (keys, values) in enumerate(handed):
            found = cache.update(keys[:, :, start:stop], values[:, :, start:stop], i)
            assert found[0].shape == found[1].shape == (batch, 2, stop, 16)
    return handed


def test_the_prompt_is_cut_and_later_tokens_are_exact():
    cache = XKVCache(CONFIG, group_size=2, rank_k=5, rank_v=7)
    handed = filled(cache, 30, 3)
    for i in range(4):
        keys, values = cache.update(*(x[:, :, -1:] for x in handed[i]), i)
        torch.testing.assert_close(keys[:, :, 30:33], handed[i][0][:, :, 30:])
        torch.testing.assert_close(values[:, :, 30:33], handed[i][1][:, :, 30:])
        pair = i // 2 * 2
        rotary = Rotary(CONFIG)
        bare = approximated([rotary.take_off(handed[j][0][:, :, :30]) for j in (pair, pair + 1)], 5)[i - pair]
        torch.testing.assert_close(keys[:, :, :30], rotary.put_on(bare), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            values[:, :, :30], approximated([handed[j][1][:, :, :30] for j in (pair, pair + 1)], 7)[i - pair],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_bytes_are_those_of_the_formula():
    cache = XKVCache(CONFIG, group_size=4, rank_k=5, rank_v=7)
    filled(cache, 50, 0)
    assert cache.nbytes == xkv_bytes(50, 32, 4, 5, 4) + xkv_bytes(50, 32, 4, 7, 4) == 4 * 12 * (50 + 128)
    for i in range(4):
        cache.update(torch.ones(1, 2, 2, 16), torch.ones(1, 2, 2, 16), i)
    assert cache.nbytes == 4 * (12 * (50 + 128) + 4 * 2 * 2 * 32)


def test_a_short_last_group_and_a_short_prompt():
    cache = XKVCache(CONFIG, group_size=3)
    handed = filled(cache, 4, 1)
    for i in range(4):  # the first group's ranks, 12 and 18, are cut to 4: nothing is lost. The last one's is 4
        keys, values = cache.update(*(x[:, :, -1:] for x in handed[i]), i)
        torch.testing.assert_close(keys[:, :, :5], handed[i][0], rtol=0, atol=1e-4)
        torch.testing.assert_close(values[:, :, :5], handed[i][1], rtol=0, atol=1e-4)


def test_cropping_everything_makes_room_for_a_new_prompt():
    cache = XKVCache(CONFIG, rank_k=4, rank_v=4)
    filled(cache, 20, 2)
    cache.crop(-22)
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    filled(cache, 20, 2)
    assert cache.nbytes == 2 * xkv_bytes(20, 32, 4, 4, 4) + 2 * 2 * 4 * 32 * 4
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-23)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(1)


def test_what_a_cache_with_other_ranks_saved_is_refused():
    cache = XKVCache(CONFIG, rank_k=4, rank_v=4)
    filled(cache, 20, 2)
    with pytest.raises(ValueError, match="rank_k"):
        XKVCache(CONFIG, rank_k=5, rank_v=4).load_state_dict(cache.state_dict())


def test_at_full_rank_smollm2_is_unchanged(smollm2):
    model, ids = smollm2.model, torch.randint(1000, 20000, (1, 20), generator=torch.Generator().manual_seed(0))
    logits = []
    for cache in (DynamicCache(), XKVCache(model.config, group_size=4, rank_k=768, rank_v=768)):
        with torch.no_grad():
            model(ids[:, :16], past_key_values=cache)
            logits.append(model(ids[:, 16:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)  # of logits up to 30


def test_misuse_is_refused_with_the_argument_named():
    for arguments, name in (({"group_size": 0}, "group_size"), ({"rank_k": 0}, "rank_k"), ({"rank_v": 129}, "rank_v")):
        with pytest.raises(ValueError, match=name):
            XKVCache(CONFIG, **arguments)
    with pytest.raises(ValueError, match="rotary"):
        XKVCache(BertConfig())
    with pytest.raises(ValueError, match="full attention"):
        XKVCache(MistralConfig(sliding_window=64))
    layers = waves()
    for rank in (0, 7):
        with pytest.raises(ValueError, match="rank"):
            cross_layer_svd(layers, rank)
    with pytest.raises(ValueError, match="layers"):
        cross_layer_svd([layers[0], layers[1][:, :1]], 1)
    with pytest.raises(ValueError, match="layers"):
        cross_layer_svd([], 1)
    with pytest.raises(ValueError, match="rank"):
        subspace_overlap(*layers, 7)
    for arguments in ({"t": math.nan}, {"gamma": 1.5}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            minicache_merge(*layers, **arguments)


@pytest.mark.parametrize("number", [2.5, True])
def test_numbers_that_are_not_whole_are_refused(number):
    layers = waves()
    for call, name in (
        (lambda: XKVCache(CONFIG, group_size=number), "group_size"),
        (lambda: XKVCache(CONFIG, rank_k=number), "rank_k"),
        (lambda: XKVCache(CONFIG, rank_v=number), "rank_v"),
        (lambda: group_layers(10, 4, number), "start"),
        (lambda: group_layers(10, 4, end=number), "end"),
        (lambda: cross_layer_svd(layers, number), "rank"),
        (lambda: subspace_overlap(*layers, number), "rank"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name}.* must be|check"):
            call()
    cache = XKVCache(CONFIG)
    filled(cache, 6, 1)
    with pytest.raises((ValueError, TypeError), match="tokens_to_remove must be|check"):
        cache.crop(False if number is True else -number)
    assert cache.get_seq_length() == 7


def test_a_share_of_the_way_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="t must be"):
        slerp(torch.ones(3), torch.ones(3), math.nan)
