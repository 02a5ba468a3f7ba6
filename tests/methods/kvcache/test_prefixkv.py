import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fairtrial.methods.kvcache import PrefixKVCache, calibrate_prefix_ratios, prefix_budgets, select_prefix
from fairtrial.methods.kvcache.prefixkv import attention_received, prefix_mask

PEAKED = torch.tensor([[8.0, *[1] * 8, 4], [1.0] * 10, [5.0, 4, 3, 2, 1, 0.5, 0.5, 0.5, 0.5, 3]])
VARIED = torch.tensor(
    [
        [8.0, *[1] * 8, 4],
        [2.5, 1.1, 0.9, 1.3, 0.7, 1.7, 0.5, 1.9, 0.3, 2.1],
        [5.0, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2, 3],
    ]
)


@pytest.mark.parametrize(
    ("target", "protect", "plain", "rescaled"),
    [
        (9, 0, [5, 2, 6], [3, 1, 4]),
        (9, 2, [3, 0, 4], [3, 0, 5]),
        (15, 0, [5, 2, 6], [5, 2, 6]),
        (15, 2, [6, 3, 5], [6, 3, 5]),
    ],
)
def test_golden_budgets(target, protect, plain, rescaled):
    assert prefix_budgets(PEAKED, target=target, protect=protect, rescale=False).tolist() == plain
    assert prefix_budgets(PEAKED, target=target, protect=protect).tolist() == rescaled


@pytest.mark.parametrize(("target", "forget"), [(9, [2, 3, 4]), (12, [3, 4, 5]), (15, [5, 4, 6]), (18, [7, 5, 6])])
def test_golden_budgets_that_meet_the_target_exactly(target, forget):
    assert prefix_budgets(VARIED, target=target, protect=0, tol=1, rescale=False).tolist() == forget


def softmax_ramps():
    return torch.stack([torch.linspace(0, a, 200, dtype=torch.float64).softmax(0) for a in (2.0, 6.0, 12.0)])


def retained(importance, forget):
    kept = [row.sort(descending=True).values[: len(row) - n].sum() for row, n in zip(importance, forget, strict=True)]
    return torch.stack(kept) / importance.sum(-1)


def test_one_threshold_for_layers_of_different_flatness():
    importance = softmax_ramps()
    forget = prefix_budgets(importance, 0.5, protect=0, rescale=False)
    assert forget.tolist() == [33, 109, 154]
    expected = torch.tensor([0.9392, 0.9379, 0.9376], dtype=torch.float64)
    torch.testing.assert_close(retained(importance, forget), expected, rtol=0, atol=5e-5)
    expected = torch.tensor([0.7320, 0.9533, 0.9976], dtype=torch.float64)
    torch.testing.assert_close(retained(importance, [100] * 3), expected, rtol=0, atol=5e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.05, 0.95))
def test_every_layer_keeps_the_fewest_tokens_that_reach_one_threshold(seed, keep):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(4, 30, generator=generator, dtype=torch.float64) ** 3
    kept = 30 - prefix_budgets(importance, keep, protect=0, rescale=False)
    cumulative = importance.sort(descending=True).values.cumsum(-1) / importance.sum(-1, keepdim=True)
    reached = cumulative.gather(1, kept[:, None] - 1).squeeze(1)
    before = torch.where(kept > 1, cumulative.gather(1, (kept[:, None] - 2).clamp_min(0)).squeeze(1), 0.0)
    assert before.max() < reached.min()  # a threshold fits in between


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_a_larger_share_never_shrinks_a_layer(seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(3, 25, generator=generator, dtype=torch.float64)
    budgets = [prefix_budgets(importance, keep / 20, tol=1, rescale=False) for keep in range(1, 21)]
    for fewer, more in itertools.pairwise(budgets):
        assert (more <= fewer).all()


def test_the_least_retained_share_is_as_large_as_the_total_allows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        importance = torch.distributions.Exponential(1.0).icdf(torch.rand(2, 6, generator=generator).double())
        for target in range(1, 10):
            forget = prefix_budgets(importance, target=target, protect=0, tol=1, rescale=False)
            if forget.sum() == target:
                splits = [(a, target - a) for a in range(6) if 0 <= target - a < 6]
                best = max(float(retained(importance, split).min()) for split in splits)
                assert float(retained(importance, forget).min()) == pytest.approx(best)


def test_equal_layers_get_equal_budgets():
    importance = torch.linspace(1, 3, 40).expand(5, -1)
    for keep in (0.2, 0.5, 0.8):
        forget = prefix_budgets(importance, keep)
        assert forget.unique().numel() == 1
        assert abs(int(forget[0]) - (1 - keep) * 40) <= 1


def test_a_threshold_that_does_not_exist_ends_the_search():
    assert prefix_budgets(torch.ones(6, 10), target=30, protect=0, tol=1, rescale=False).sum() in (24, 30, 36)
    assert prefix_budgets(torch.tensor([[1.0, 1e-30, 0, 0]]), target=3, protect=0, tol=1).tolist() == [3]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), forget=st.integers(0, 16))
def test_what_stays_is_the_ends_and_the_most_important_in_order(seed, forget):
    importance = torch.rand(2, 20, generator=torch.Generator().manual_seed(seed))
    kept = select_prefix(importance, forget, start=2, protect_last=2)
    assert kept.shape == (2, 20 - forget)
    assert (kept.diff() > 0).all()
    for row, places in zip(importance, kept.tolist(), strict=True):
        assert {0, 1, 18, 19} <= set(places)
        dropped = sorted(set(range(20)) - set(places))
        inner = [place for place in places if 2 <= place < 18]
        if dropped and inner:
            assert row[dropped].max() <= row[inner].min()


def test_padding_goes_first_and_does_not_count():
    importance = torch.rand(12, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((5,), 9.0), importance])
    alone = prefix_mask(importance, torch.tensor(4), 1)
    assert prefix_mask(padded, torch.tensor(4), 1, padding=torch.tensor(5)).tolist() == [False] * 5 + alone.tolist()


def test_attention_received_is_the_column_sum_of_the_mean_over_heads():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 150, 8, generator=generator), torch.randn(2, 2, 150, 8, generator=generator)
    causal = torch.ones(150, 150, dtype=torch.bool).tril()
    scores = query @ key.repeat_interleave(3, 1).mT / math.sqrt(8)
    expected = scores.masked_fill(~causal, -math.inf).softmax(-1).mean(1).sum(1)
    torch.testing.assert_close(attention_received(query, key), expected)
    torch.testing.assert_close(attention_received(query, key, causal[None, None]), expected)
    added = torch.zeros(1, 1, 150, 150).masked_fill(~causal, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention_received(query, key, added), expected)


@pytest.fixture(scope="module")
def text(small_gpt):
    passage = "sorted(iterable, key=None) returns a new sorted list from the items; see also list.sort(). "
    return small_gpt.tokenizer(passage * 3, return_tensors="pt").input_ids


@torch.no_grad()
def read(model, cache, ids, **options):
    with cache.attached_to(model):
        return model(ids, past_key_values=cache, **options).logits


def lengths(cache):
    return [layer.keys.shape[-2] for layer in cache.layers]


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_after_the_prompt_the_whole_cache_holds_its_share(small_gpt, text, keep):
    cache = PrefixKVCache(small_gpt.model.config, keep)
    read(small_gpt.model, cache, text[:, :120])
    assert len(set(lengths(cache))) > 1
    assert sum(lengths(cache)) == pytest.approx(keep * 4 * 120, abs=4)
    for layer in cache.layers:
        assert layer.positions[0, 0] == 0
        assert layer.positions[0, -1] == 119
        assert (layer.positions.diff() > 0).all()


def test_keys_and_values_are_those_of_the_kept_tokens(small_gpt, text):
    plain, cache = DynamicCache(), PrefixKVCache(small_gpt.model.config, 0.4)
    read(small_gpt.model, cache, text[:, :100])
    with torch.no_grad():
        small_gpt.model(text[:, :100], past_key_values=plain)
    for layer, whole in zip(cache.layers, plain.layers, strict=True):
        at = layer.positions[0].long()
        torch.testing.assert_close(layer.keys, whole.keys[:, :, at], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.values, whole.values[:, :, at], rtol=1e-5, atol=1e-5)


def test_what_is_decoded_pushes_tokens_out_at_a_fixed_place(small_gpt, text):
    model, cache = small_gpt.model, PrefixKVCache(small_gpt.model.config, ratios=[0.5, 0.25, 0.0, 0.75])
    read(model, cache, text[:, :100])
    assert lengths(cache) == [50, 75, 100, 25]
    assert [int(layer.place) for layer in cache.layers] == [25, 50, 75, 12]  # the last: 25 from the end is before 1
    kept = [layer.positions[0].tolist() for layer in cache.layers]
    for i in range(100, 140):
        read(model, cache, text[:, i : i + 1])
    assert lengths(cache) == [70, 105, 140, 35]
    first = cache.layers[0].positions[0].tolist()
    assert first == kept[0][:25] + kept[0][45:] + list(range(100, 140))
    last = cache.layers[3].positions[0].tolist()
    assert last == kept[3][:12] + list(range(117, 140))  # 13 of the prompt, then the oldest of the others
    assert cache.layers[2].positions[0].tolist() == list(range(140))


def test_tokens_read_together_are_dropped_as_if_read_one_by_one(small_gpt, text):
    together, apart = (PrefixKVCache(small_gpt.model.config, 0.3) for _ in range(2))
    for cache, parts in ((together, [text[:, 100:130]]), (apart, text[:, 100:130].split(1, 1))):
        read(small_gpt.model, cache, text[:, :100])
        for part in parts:
            read(small_gpt.model, cache, part)
    for one, other in zip(together.layers, apart.layers, strict=True):
        assert torch.equal(one.positions, other.positions)


def test_padded_sequences_of_a_batch_are_as_by_themselves(small_gpt, text):
    model = small_gpt.model
    first, second = text[:, :90], text[:, 40:150]
    padded = torch.cat([torch.cat([torch.zeros(1, 20, dtype=torch.long), first], 1), second])
    mask = torch.ones_like(padded)
    mask[0, :20] = 0
    cache, singles = PrefixKVCache(model.config, 0.4), [PrefixKVCache(model.config, 0.4) for _ in range(2)]
    places = mask.cumsum(-1) - 1
    found = read(model, cache, padded, attention_mask=mask, position_ids=places.clamp_min(0))[:, -1:]
    expected = torch.cat([read(model, c, x)[:, -1:] for c, x in zip(singles, (first, second), strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for i in range(8):
        token, mask = text[:, i : i + 1], torch.cat([mask, mask.new_ones(2, 1)], 1)
        at = mask.sum(-1, keepdim=True) - 1
        found = read(model, cache, token.expand(2, 1), attention_mask=mask, position_ids=at)
        expected = torch.cat([read(model, single, token) for single in singles])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for layer, one, other in zip(cache.layers, *(single.layers for single in singles), strict=True):
        assert (layer.positions >= 0).sum(-1).tolist() == [one.keys.shape[-2], other.keys.shape[-2]]


def test_ratios_measured_ahead(small_gpt, text):
    model = small_gpt.model
    ratios = calibrate_prefix_ratios(model, [text[:, :100], text[:, 100:180]], 0.5)
    each = [calibrate_prefix_ratios(model, [part], 0.5) for part in (text[:, :100], text[:, 100:180])]
    assert ratios == pytest.approx([(a + b) / 2 for a, b in zip(*each, strict=True)])
    assert sum(ratios) / 4 == pytest.approx(0.5, abs=0.02)
    cache = PrefixKVCache(model.config, ratios=ratios)
    read(model, cache, text[:, :120])
    assert lengths(cache) == [120 - round(120 * ratio) for ratio in ratios]


def test_short_prompts_stay_whole(small_gpt, text):
    cache = PrefixKVCache(small_gpt.model.config, 0.25)
    read(small_gpt.model, cache, text[:, :2])
    assert lengths(cache) == [2] * 4
    for i in range(2, 60):
        read(small_gpt.model, cache, text[:, i : i + 1])
    assert lengths(cache) == [15] * 4


@pytest.mark.parametrize(("start", "prompt"), [(1, 1), (20, 40), (100, 30)])
def test_the_first_tokens_stay_while_decoding_goes_on(small_gpt, text, start, prompt):
    cache = PrefixKVCache(small_gpt.model.config, 0.5, start_size=start)
    for part in (text[:, :prompt], *text[:, prompt : prompt + 30].split(1, 1)):
        read(small_gpt.model, cache, part)
    kept = list(range(min(start, prompt + 30)))
    assert all(layer.positions[0, : len(kept)].tolist() == kept for layer in cache.layers)


@torch.no_grad()
def test_smollm2_at_ratio_one_and_shortened(smollm2):
    model = smollm2.model
    ids = smollm2.tokenizer("The garbage collector frees objects that are part of a cycle. " * 3, return_tensors="pt")
    ids, cache, plain = ids.input_ids, PrefixKVCache(model.config, 1.0), DynamicCache(config=model.config)
    for part in (ids[:, :30], ids[:, 30:32]):
        found, expected = read(model, cache, part), model(part, past_key_values=plain).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    short = PrefixKVCache(model.config, 0.5)
    assert read(model, short, ids).isfinite().all()
    assert short.nbytes == pytest.approx(0.5 * ids.shape[1] * 30 * (2 * 3 * 64 * 4 + 4), rel=0.1)


def test_a_cache_that_has_dropped_tokens_cannot_be_cropped(small_gpt, text):
    cache = PrefixKVCache(small_gpt.model.config, 0.5)
    read(small_gpt.model, cache, text[:, :50])
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="dropped"):
        cache.crop(-1)


def test_it_asks_to_be_attached_and_leaves_the_model_as_it_was(small_gpt, text):
    model, cache = small_gpt.model, PrefixKVCache(small_gpt.model.config)
    with pytest.raises(RuntimeError, match="attached_to"):
        model(text[:, :9], past_key_values=cache)
    before = model.config._attn_implementation
    with torch.no_grad(), cache.attached_to(model):
        with pytest.raises(RuntimeError, match="already"), cache.attached_to(model):
            pass
        plain = model(text[:, :9], past_key_values=DynamicCache()).logits
        torch.testing.assert_close(plain, model(text[:, :9], use_cache=False).logits)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="model"), cache.attached_to(nn.Linear(1, 1)):
        pass


@torch.no_grad()
def test_attention_that_does_not_ask_the_cache_is_refused(small_gpt, text):
    model, ids = small_gpt.model, text[:, :30]
    other, (outer, inner) = copy.deepcopy(model), (PrefixKVCache(model.config) for _ in range(2))
    with outer.attached_to(model):
        with pytest.raises(RuntimeError, match="layer 0"):
            other(ids, past_key_values=outer)
        outer.reset()
        with inner.attached_to(model), pytest.raises(RuntimeError, match="layer 0"):
            model(ids, past_key_values=outer)
        outer.reset()
        found = model(ids, past_key_values=outer).logits
    assert torch.equal(found, read(model, inner, ids))
    assert lengths(outer) == lengths(inner)


@torch.no_grad()
def test_a_last_layer_that_does_not_ask_the_cache_is_refused_on_leaving():
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16, vocab_size=30
    )
    model, cache = LlamaForCausalLM(config), PrefixKVCache(config)
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="layer 0"), cache.attached_to(model):
        other(torch.arange(9)[None], past_key_values=cache)
    cache.reset()
    assert read(model, cache, torch.arange(9)[None]).isfinite().all()


@torch.no_grad()
def test_a_copy_is_not_attached(small_gpt, text):
    model, cache, following = small_gpt.model, PrefixKVCache(small_gpt.model.config), text[:, 30:31]
    with cache.attached_to(model):
        model(text[:, :30], past_key_values=cache)
        copied = copy.deepcopy(cache)
        with pytest.raises(RuntimeError, match="attached_to"):
            model(following, past_key_values=copied)
    assert torch.equal(read(model, copied, following), read(model, cache, following))


def test_encoders_are_refused(minilm):
    ids = torch.arange(1, 10)[None]
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=30))
    for model in (minilm.model, t5):
        with pytest.raises(ValueError, match="encoder"), PrefixKVCache(model.config).attached_to(model):
            pass
        with pytest.raises(ValueError, match="encoder"):
            calibrate_prefix_ratios(model, [ids], 0.5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("keep_ratio", {"keep_ratio": 0.0}),
        ("keep_ratio", {"keep_ratio": 1.5}),
        ("keep_ratio", {"keep_ratio": math.nan}),
        ("ratios", {"ratios": [0.5]}),
        ("ratios", {"ratios": [0.5, 0.5, math.nan, 0.5]}),
        ("ratios", {"ratios": [0.5, 0.5, 1.0, 0.5]}),
        ("start_size", {"start_size": -1}),
        ("distance", {"distance": 0}),
    ],
)
def test_misuse_of_the_cache_is_refused(small_gpt, name, arguments):
    with pytest.raises(ValueError, match=name):
        PrefixKVCache(small_gpt.model.config, **arguments)


@pytest.mark.parametrize(
    ("name", "importance", "arguments"),
    [
        ("keep_ratio", torch.ones(2, 9), {"keep_ratio": 0.0}),
        ("keep_ratio", torch.ones(2, 9), {}),
        ("keep_ratio", torch.ones(2, 9), {"keep_ratio": 0.5, "target": 3}),
        ("target", torch.ones(2, 9), {"target": 18}),
        ("tol", torch.ones(2, 9), {"keep_ratio": 0.5, "tol": 0}),
        ("importance", torch.ones(2, 2), {"keep_ratio": 0.5}),
        ("importance", torch.full((2, 9), math.nan), {"keep_ratio": 0.5}),
        ("importance", torch.zeros(2, 9), {"keep_ratio": 0.5}),
    ],
)
def test_misuse_of_the_budgets_is_refused(name, importance, arguments):
    with pytest.raises(ValueError, match=name):
        prefix_budgets(importance, **arguments)


def test_misuse_of_selection_and_calibration_is_refused(small_gpt, text):
    with pytest.raises(ValueError, match="forget"):
        select_prefix(torch.ones(5), 4)
    with pytest.raises(ValueError, match="start"):
        select_prefix(torch.ones(5), 0, start=5)
    with pytest.raises(ValueError, match="samples"):
        calibrate_prefix_ratios(small_gpt.model, [], 0.5)
    with pytest.raises(ValueError, match="samples"):
        calibrate_prefix_ratios(small_gpt.model, [text[:, :2]], 0.5)


@pytest.mark.parametrize("number", [2.5, True])
def test_numbers_that_are_not_whole_are_refused(small_gpt, text, number):
    config, flat = small_gpt.model.config, torch.ones(2, 9)
    for call, name in (
        (lambda: PrefixKVCache(config, start_size=number), "start_size"),
        (lambda: PrefixKVCache(config, distance=number), "distance"),
        (lambda: prefix_budgets(flat, target=number), "target"),
        (lambda: prefix_budgets(flat, 0.5, protect=number), "protect"),
        (lambda: prefix_budgets(flat, 0.5, tol=number), "tol"),
        (lambda: select_prefix(flat, number), "forget"),
        (lambda: select_prefix(flat, 2, start=number), "start"),
        (lambda: select_prefix(flat, 2, protect_last=number), "protect_last"),
        (lambda: calibrate_prefix_ratios(small_gpt.model, [text], 0.5, number), "start_size"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name}.* must be|check"):
            call()


@torch.no_grad()
def test_a_batch_of_which_one_sequence_has_dropped_tokens_cannot_be_cropped(small_gpt, text):
    cache = PrefixKVCache(small_gpt.model.config, 1.0)
    read(small_gpt.model, cache, text[:, :20].expand(2, -1))
    assert cache.is_croppable
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[1, 3:9] = False
    for layer in cache.layers:
        layer.keep(kept)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="dropped"):
        cache.crop(-1)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.is_croppable


@torch.no_grad()
def test_padding_that_was_dropped_does_not_keep_a_batch_from_being_cropped(small_gpt, text):
    model, ids, mask = small_gpt.model, text[:, :20].expand(2, -1), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    cache = PrefixKVCache(model.config, 1.0)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = read(model, cache, ids, attention_mask=mask, position_ids=places)
    assert cache.is_croppable
    cache.crop(-3)
    found = read(model, cache, ids[:, -3:], attention_mask=mask, position_ids=places[:, -3:])
    torch.testing.assert_close(found, expected[:, -3:], rtol=1e-4, atol=1e-4)
