import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from fairtrial.methods.kvcache import (
    A2ATSCache,
    VQKeyCache,
    approx_scores,
    assign_codes,
    codewords,
    query_factor,
    rotate_query,
    select_tokens,
    train_codebook,
    train_codebooks,
    train_query_aware_codebook,
)
from fairtrial.methods.kvcache.a2ats import Rotation, unrotated

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_factor_of_a_small_metric():
    factor = torch.linalg.cholesky(torch.tensor([[4.0, 2.0], [2.0, 3.0]]))
    torch.testing.assert_close(factor, torch.tensor([[2.0, 0.0], [1.0, 1.414214]]), rtol=0, atol=1e-6)
    gram = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=F64)
    scaled = gram / gram.square().mean().sqrt()
    factor = query_factor(gram, jitter=0.0)
    torch.testing.assert_close(factor @ factor.mT, scaled)
    torch.testing.assert_close(query_factor(7 * gram, jitter=0.0), factor)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.44]),
        ([[4.0, 2.0], [2.0, 3.0]], [4.0, 4.32]),
        ([[1.0, 0.0], [0.0, 9.0]], [1.0, 12.96]),
        ([[9.0, 0.0], [0.0, 1.0]], [9.0, 1.44]),
    ],
)
def test_golden_distances_in_the_metric_of_the_queries(metric, expected):
    metric = torch.tensor(metric)
    factor = torch.linalg.cholesky(metric)
    key, codes = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, -0.2]])
    found = ((key - codes) @ factor).square().sum(-1)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert int(assign_codes(key, codes @ factor, factor)) == expected.index(min(expected))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_the_distance_after_the_factor_is_the_expected_squared_error_of_scores(seed):
    g = generator(seed)
    keys, codes = torch.randn(20, 6, generator=g, dtype=F64), torch.randn(5, 6, generator=g, dtype=F64)
    queries = torch.randn(40, 6, generator=g, dtype=F64)
    gram = queries.mT @ queries
    size = gram.square().mean().sqrt()
    factor = query_factor(gram, jitter=0.0)
    difference = keys[:, None] - codes
    distance = (difference @ factor).square().sum(-1) * size
    torch.testing.assert_close(distance, torch.einsum("nci,ij,ncj->nc", difference, gram, difference))
    error = (difference @ queries.mT).square().sum(-1)
    torch.testing.assert_close(distance, error)
    nearest = assign_codes(keys, codes @ factor, factor)
    assert torch.equal(nearest, error.argmin(-1))  # for one codebook no other assignment is better, for any key
    torch.testing.assert_close(codewords(codes @ factor, factor), codes)


def test_a_metric_without_direction_leaves_plain_vector_quantisation():
    keys = torch.randn(80, 4, generator=generator())
    factor = query_factor(5 * torch.eye(4))
    aware, plain = (train_codebook(keys, by, 8, generator(1)) for by in (factor, torch.eye(4)))
    torch.testing.assert_close(codewords(aware, factor), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(assign_codes(keys, aware, factor), assign_codes(keys, plain, torch.eye(4)))


@pytest.mark.parametrize("seed", range(12))
def test_query_aware_codebooks_preserve_products_better(seed):
    g = generator(seed)
    spread = torch.tensor([3.0, 1.0, 0.3, 0.1])
    keys = torch.randn(64, 4, generator=g)
    queries, fresh = (torch.randn(2000, 4, generator=g) * spread for _ in range(2))
    aware, factor = train_query_aware_codebook(keys, queries, 8, generator(seed))
    identity = torch.eye(4)
    plain = train_codebook(keys, identity, 8, generator(seed))

    def error(words, codes):
        return float(((keys - words[codes]) @ fresh.mT).square().mean())

    both = error(codewords(aware, factor), assign_codes(keys, aware, factor))
    assignment = error(plain, assign_codes(keys, plain @ factor, factor))
    neither = error(plain, assign_codes(keys, plain, identity))
    assert both < assignment < neither
    assert both < 1.3
    assert 2.2 < neither < 5


def test_with_a_code_for_every_key_scores_are_exact():
    g = generator()
    keys, query = torch.randn(2, 30, 8, generator=g), torch.randn(6, 5, 8, generator=g)
    books = [train_query_aware_codebook(rows, torch.randn(100, 8, generator=g), 30, g) for rows in keys]
    codebook, factor = (torch.stack(parts) for parts in zip(*books, strict=True))
    found = approx_scores(query, assign_codes(keys, codebook, factor), codewords(codebook, factor))
    expected = query @ keys.repeat_interleave(3, 0).mT / math.sqrt(8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        select_tokens(found[:, 0], 0.2, window=4, sink=2), select_tokens(expected[:, 0], 0.2, window=4, sink=2)
    )


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 60),
    ratio=st.sampled_from([0.03, 0.2, 0.5, 1.0]),
    window=st.integers(1, 20),
    sink=st.integers(0, 10),
)
def test_what_is_attended_to(seed, tokens, ratio, window, sink):
    scores = torch.randn(6, tokens, generator=generator(seed))
    taken = select_tokens(scores, ratio, window=window, sink=sink, groups=3)
    assert taken[:, -window:].all()
    assert taken[:, :sink].all()
    assert torch.equal(taken[0:3], taken[:1].expand(3, -1))
    inner = slice(sink, max(sink, tokens - window))
    count = min(int(tokens * ratio), len(range(tokens)[inner]))
    retrieved = taken[:, inner].sum(-1)
    assert ((retrieved >= count) & (retrieved <= 3 * count)).all()
    if ratio == 1 or tokens <= window + sink:
        assert taken.all()
    for row, kept in zip(scores, taken, strict=True):
        best = row[inner].topk(count).indices
        assert kept[inner][best].all()


def test_padding_counts_for_nothing():
    scores = torch.randn(2, 50, generator=generator())
    padded = torch.cat([torch.full((2, 9), 99.0), scores], 1)
    visible = torch.arange(59)[None] >= 9
    found = select_tokens(padded, 0.2, window=6, sink=3, groups=2, visible=visible)
    assert not found[:, :9].any()
    assert torch.equal(found[:, 9:], select_tokens(scores, 0.2, window=6, sink=3, groups=2))


@pytest.fixture(scope="module")
def text(small_gpt):
    passage = "sorted(iterable, key=None) returns a new sorted list from the items; see also list.sort(). "
    return small_gpt.tokenizer(passage * 3, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def books(small_gpt, text):
    return train_codebooks(small_gpt.model, [text[:, :200]], generator(), n_codes=24, offset=128)


def made(small_gpt, books, **options):
    return VQKeyCache(small_gpt.model, books, **({"window": 8, "sink": 2, "top_ratio": 0.1} | options))


@torch.no_grad()
def read(model, cache, ids, **options):
    with cache.attached_to(model):
        return model(ids, past_key_values=cache, **options).logits


def test_rotations_are_the_models_own(small_gpt):
    rotation = Rotation(small_gpt.model)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=generator())
    products = [
        float((rotate_query(query, m, rotation) * rotate_query(key, n, rotation)).sum())
        for m, n in ((70, 6), (164, 100))
    ]
    assert products[0] == pytest.approx(products[1], abs=1e-4)
    there = rotate_query(query, 37, rotation)
    cos, sin = rotation.at(torch.tensor([[37]]), query)
    torch.testing.assert_close(unrotated(there, cos, sin), query, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unrotated(1.5 * there, 1.5 * cos, 1.5 * sin), query, rtol=1e-5, atol=1e-5)


def test_codes_are_those_of_the_projected_keys(small_gpt, books, text):
    model, cache = small_gpt.model, made(small_gpt, books)
    found = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, out, n=n: found.update({n: out}))
        for n, layer in enumerate(model.model.layers)
    ]
    read(model, cache, text[:, :90])
    for hook in hooks:
        hook.remove()
    for n, layer in enumerate(cache.layers):
        keys = found[n].unflatten(-1, (2, 32)).transpose(1, 2)
        assert layer.codes.dtype == torch.int16
        assert torch.equal(layer.codes.long(), assign_codes(keys, books.codes[n][None], books.factors[n][None]))


def test_with_all_tokens_or_within_the_window_attention_is_exact(small_gpt, books, text):
    for options in ({"top_ratio": 1.0}, {"window": 300}):
        cache, plain = made(small_gpt, books, **options), DynamicCache()
        for part in (text[:, :60], text[:, 60:61], text[:, 61:80]):
            with torch.no_grad():
                expected = small_gpt.model(part, past_key_values=plain).logits
            torch.testing.assert_close(read(small_gpt.model, cache, part), expected, rtol=0, atol=1e-4)


def test_with_a_code_for_every_rotated_key_the_best_tokens_are_taken(small_gpt, text):
    model, ids = small_gpt.model, text[:, :80]
    books = train_codebooks(model, [ids], generator(), n_codes=80, offset=None, max_iter=1)
    cache, found = made(small_gpt, books), []
    plain = cache.selected

    def selected(module, query, key, mask, **options):
        taken = plain(module, query, key, mask, **options)
        if query.shape[2] < key.shape[2]:
            scores = query @ key.repeat_interleave(2, 1).mT
            past = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            exact = {"window": 8, "sink": 2, "groups": 2, "visible": past[None, :, None]}
            found.append((taken, select_tokens(scores.transpose(1, 2), 0.1, **exact).transpose(1, 2)))
        return taken

    cache.selected = selected
    read(model, cache, ids[:, :70])
    read(model, cache, ids[:, 70:])
    assert len(found) == 4
    taken, best = found[0]  # later layers see other queries than the calibration did, but the first does not
    assert (taken == best).float().mean() > 0.99


def test_tokens_that_come_together_are_treated_as_by_themselves(small_gpt, books, text):
    together, apart = made(small_gpt, books), made(small_gpt, books)
    for cache in (together, apart):
        read(small_gpt.model, cache, text[:, :100])
    found = read(small_gpt.model, together, text[:, 100:120])
    expected = torch.cat([read(small_gpt.model, apart, part) for part in text[:, 100:120].split(1, 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = DynamicCache()
    with torch.no_grad():
        small_gpt.model(text[:, :100], past_key_values=plain)
        exact = small_gpt.model(text[:, 100:120], past_key_values=plain).logits
    assert (found - exact).abs().max() > 1e-2


def test_padded_sequences_of_a_batch_are_as_by_themselves(small_gpt, books, text):
    model = small_gpt.model
    first, second = text[:, :90], text[:, 40:150]
    padded = torch.cat([torch.cat([torch.zeros(1, 20, dtype=torch.long), first], 1), second])
    mask = torch.ones_like(padded)
    mask[0, :20] = 0
    cache, singles = made(small_gpt, books), [made(small_gpt, books) for _ in range(2)]
    read(model, cache, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    for single, ids in zip(singles, (first, second), strict=True):
        read(model, single, ids)
    for i in range(5):
        token, mask = text[:, i : i + 1], torch.cat([mask, mask.new_ones(2, 1)], 1)
        at = mask.sum(-1, keepdim=True) - 1
        found = read(model, cache, token.expand(2, 1), attention_mask=mask, position_ids=at)
        expected = torch.cat([read(model, single, token) for single in singles])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_saved_with_its_codebooks(small_gpt, books, text):
    model, cache = small_gpt.model, made(small_gpt, books)
    read(model, cache, text[:, :80])
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = made(small_gpt, train_codebooks(model, [text[:, 50:250]], generator(1), n_codes=24, offset=128))
    other.load_state_dict(torch.load(file, weights_only=True))
    following = text[:, 80:90]
    assert torch.equal(read(model, other, following), read(model, cache, following))
    with pytest.raises(ValueError, match="state"):
        made(small_gpt, books, top_ratio=0.2).load_state_dict(cache.state_dict())


@torch.no_grad()
def test_codebooks_that_are_loaded_while_it_is_attached_are_used(small_gpt, books, text):
    model, cache = small_gpt.model, made(small_gpt, books)
    read(model, cache, text[:, :80])
    state, following = cache.state_dict(), text[:, 80:90]
    other = made(small_gpt, train_codebooks(model, [text[:, 50:250]], generator(1), n_codes=24, offset=128))
    with other.attached_to(model):
        other.load_state_dict(state)
        found = model(following, past_key_values=other).logits
    assert torch.equal(found, read(model, cache, following))
    with pytest.raises(ValueError, match="codebooks"):
        other.load_state_dict({name: part for name, part in state.items() if name != "codebooks"})
    assert other.get_seq_length() == 90


@torch.no_grad()
def test_a_copy_is_not_attached(small_gpt, books, text):
    model, cache, following = small_gpt.model, made(small_gpt, books), text[:, 80:81]
    with cache.attached_to(model):
        model(text[:, :80], past_key_values=cache)
        copied = copy.deepcopy(cache)
        with pytest.raises(RuntimeError, match="attached_to"):
            model(following, past_key_values=copied)
        with pytest.raises(RuntimeError, match="already"), cache.attached_to(model):
            pass
        found = model(following, past_key_values=cache).logits
    assert copied.nbytes < cache.nbytes
    assert torch.equal(read(model, copied, following), found)


def test_bytes_count_codes_and_codebooks(small_gpt, books, text):
    cache = made(small_gpt, books)
    assert cache.nbytes == 4 * 2 * (24 * 32 + 32 * 32) * 4
    read(small_gpt.model, cache, text[:, :80])
    assert cache.nbytes == books.nbytes + 4 * 2 * 80 * (2 * 32 * 4 + 2)


@torch.no_grad()
def test_smollm2_with_all_tokens_and_with_few(smollm2):
    model = smollm2.model
    ids = smollm2.tokenizer("The garbage collector frees objects that are part of a cycle. " * 3, return_tensors="pt")
    ids, plain = ids.input_ids, DynamicCache(config=model.config)
    books = train_codebooks(model, [ids], generator(), n_codes=2, query_aware=False)
    cache = VQKeyCache(model, books, top_ratio=1.0, window=4, sink=1)
    for part in (ids[:, :30], ids[:, 30:32]):
        found, expected = read(model, cache, part), model(part, past_key_values=plain).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert read(model, VQKeyCache(model, books, window=4, sink=1), ids).isfinite().all()


def test_codes_per_token_are_the_authors_unless_given(small_gpt, text):
    cache = A2ATSCache(small_gpt.model, [text[:, :130], text[:, 130:200]], generator(), max_iter=2)
    assert [len(book[0]) for book in cache.codebooks.codes] == [10] * 4
    assert (cache.top_ratio, cache.window, cache.sink, cache.codebooks.offset) == (0.03, 64, 8, 2048)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("top_ratio", {"top_ratio": 0.0}),
        ("top_ratio", {"top_ratio": math.nan}),
        ("top_ratio", {"top_ratio": 1.01}),
        ("window", {"window": 0}),
        ("sink", {"sink": -1}),
    ],
)
def test_misuse_of_the_cache_is_refused(small_gpt, books, name, arguments):
    with pytest.raises(ValueError, match=name):
        made(small_gpt, books, **arguments)
    with pytest.raises(ValueError, match=name):
        select_tokens(torch.ones(2, 5), **({"top_ratio": 0.5} | arguments))


def test_misuse_of_training_is_refused(small_gpt, minilm, smollm2, books, text):
    keys = torch.randn(10, 4, generator=generator())
    with pytest.raises(ValueError, match="n_codes"):
        train_codebook(keys, torch.eye(4), 11, generator())
    with pytest.raises(ValueError, match="keys"):
        train_codebook(keys * math.nan, torch.eye(4), 2, generator())
    with pytest.raises(ValueError, match="queries"):
        train_query_aware_codebook(keys, torch.zeros(5, 4), 2, generator())
    with pytest.raises(ValueError, match="queries"):
        query_factor(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(ValueError, match="n_codes"):
        train_codebooks(small_gpt.model, [text[:, :10]], generator(), n_codes=11)
    with pytest.raises(ValueError, match="n_codes"):
        train_codebooks(small_gpt.model, [], generator(), n_codes=11)
    with pytest.raises(ValueError, match="offset"):
        train_codebooks(small_gpt.model, [text[:, :10]], generator(), offset=-1)
    with pytest.raises(ValueError, match="groups"):
        select_tokens(torch.ones(4, 9), 0.5, groups=3)
    with pytest.raises(ValueError, match="codebooks"):
        VQKeyCache(smollm2.model, books)
    with pytest.raises(ValueError, match="rotary"):
        Rotation(minilm.model)
    with pytest.raises(RuntimeError, match="attached_to"):
        small_gpt.model(text[:, :9], past_key_values=made(small_gpt, books))


@pytest.mark.parametrize("number", [2.5, True])
def test_numbers_that_are_not_whole_are_refused(small_gpt, books, text, number):
    keys, model = torch.randn(10, 4, generator=generator()), small_gpt.model
    for call, name in (
        (lambda: made(small_gpt, books, window=number), "window"),
        (lambda: made(small_gpt, books, sink=number), "sink"),
        (lambda: select_tokens(torch.ones(4, 9), 0.5, groups=number), "groups"),
        (lambda: train_codebook(keys, torch.eye(4), number, generator()), "n_codes"),
        (lambda: train_codebook(keys, torch.eye(4), 2, generator(), max_iter=number), "max_iter"),
        (lambda: train_codebooks(nn.Linear(1, 1), [text], generator(), n_codes=number), "n_codes"),
        (lambda: train_codebooks(nn.Linear(1, 1), [text], generator(), max_iter=number), "max_iter"),
        (lambda: train_codebooks(model, [text[:, :30]], generator(), offset=number), "offset"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be|check"):
            call()
