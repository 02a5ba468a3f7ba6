"""What caches of all kinds refuse, by which they must not change."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fairtrial.methods.kvcache import (
    CSKVCache,
    PrefixKVCache,
    RotateKVCache,
    VQKeyCache,
    XKVCache,
    factorize_cskv,
    train_codebooks,
)

IDS = torch.randint(64, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=32,
        vocab_size=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def vq_key(model):
    books = train_codebooks(model, [IDS], torch.Generator().manual_seed(0), n_codes=4, offset=16, max_iter=2)
    return VQKeyCache(model, books, window=2, sink=1)


MAKERS = {
    "cskv": lambda model: CSKVCache(factorize_cskv(model, 0.5, 0.5), 4),
    "cskv of few bits": lambda model: CSKVCache(factorize_cskv(model, 0.5, 0.5), 4, 4, 2),
    "prefixkv": lambda model: PrefixKVCache(model.config),
    "rotatekv": lambda model: RotateKVCache(model.config, sinks=3),
    "rotatekv of 16 bits": lambda model: RotateKVCache(model.config, bits=16, sinks=0),
    "vq_key": vq_key,
    "xkv": lambda model: XKVCache(model.config, group_size=2, rank_k=3, rank_v=4),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def make(request, model):
    return lambda: request.param(model)


def attached(cache, model):
    return cache.attached_to(model) if hasattr(cache, "attached_to") else nullcontext()


@torch.no_grad()
def read(model, cache, ids):
    with attached(cache, model):
        return model(ids, past_key_values=cache).logits


def filled(model, make):
    cache = make()
    for part in (IDS[:, :9], IDS[:, 9:10]):
        read(model, cache, part)
    return cache


def snapshot(cache):
    return cache.get_seq_length(), [layer.held() for layer in cache.layers]


def same(before, after):
    alike = before[0] == after[0] and [x.keys() for x in before[1]] == [x.keys() for x in after[1]]
    return alike and all(x[name] is y[name] for x, y in zip(before[1], after[1], strict=True) for name in x)


def without(state, *path):
    """The state without what stands there."""
    state = copy.deepcopy(state)
    *path, last = path
    inside = state
    for step in path:
        inside = inside[step]
    del inside[last]
    return state


def test_a_state_that_lacks_a_part_is_refused_and_changes_nothing(model, make):
    state, other = filled(model, make).state_dict(), make()
    read(model, other, IDS[:, :6])
    before = snapshot(other)
    last = len(state["layers"]) - 1
    names = list(state["layers"][last])
    paths = [("settings",), ("layers",), ("layers", last), *(("layers", last, name) for name in names)]
    for path in paths:
        with pytest.raises(ValueError, match=f"state.*{path[-1] if len(path) != 2 else 'layers'}"):
            other.load_state_dict(without(state, *path))
        assert same(before, snapshot(other))
    other.load_state_dict(state)
    assert torch.equal(read(model, other, IDS[:, 10:11]), read(model, filled(model, make), IDS[:, 10:11]))


def test_a_state_with_other_tensors_is_refused_and_changes_nothing(model, make):
    state, other = filled(model, make).state_dict(), make()
    read(model, other, IDS[:, :6])
    before = snapshot(other)
    last = state["layers"][-1]
    wrong = [{name: tensor[:1]} for name, tensor in last.items()]
    wrong += [{name: tensor[..., None]} for name, tensor in last.items()]
    wrong += [{name: tensor[:, :-1]} for name, tensor in last.items() if tensor.ndim > 1]
    wrong += [{name: tensor[..., :0]} for name, tensor in last.items()]
    wrong += [{name: tensor.tolist()} for name, tensor in last.items()]
    for change in [*wrong, {"another": torch.zeros(2, 3)}]:
        changed = state | {"layers": [*state["layers"][:-1], last | change]}
        with pytest.raises(ValueError, match="layer 2 of the state"):
            other.load_state_dict(changed)
        assert same(before, snapshot(other))
    with pytest.raises(ValueError, match="layer 2 of the state"):
        other.load_state_dict(state | {"layers": [*state["layers"][:-1], {}]})
    assert same(before, snapshot(other))


def test_what_was_saved_before_the_first_token_or_in_the_middle_of_decoding_is_loaded(model, make):
    for length in (0, 1, 8, 9, 13):
        cache, other = make(), make()
        read(model, other, IDS[:, :6])
        if length:
            read(model, cache, IDS[:, :8][:, :length])
        for i in range(8, length):
            read(model, cache, IDS[:, i : i + 1])
        other.load_state_dict(cache.state_dict())
        assert other.get_seq_length() == length
        other.batch_select_indices(torch.tensor([1, 0, 1]))
        again = make()
        again.load_state_dict(other.state_dict())
        assert same(snapshot(other), snapshot(again))


@torch.no_grad()
def test_another_batch_or_another_models_keys_are_refused_and_change_nothing(model, make):
    cache = filled(model, make)
    before, expected = snapshot(cache), read(model, filled(model, make), IDS[:, 10:11])
    for shape in ((3, 2, 1, 16), (1, 2, 1, 16), (2, 4, 1, 16), (2, 2, 1, 8)):
        with attached(cache, model), pytest.raises(ValueError, match="key_states"):
            cache.update(torch.zeros(shape), torch.zeros(shape), 0)
        assert same(before, snapshot(cache))
    with attached(cache, model), pytest.raises(ValueError, match="value_states"):
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 2, 16), 0)
    assert same(before, snapshot(cache))
    assert torch.equal(read(model, cache, IDS[:, 10:11]), expected)


def test_codebooks_of_other_shapes_are_refused_and_change_nothing(model):
    cache, other = filled(model, lambda: vq_key(model)), vq_key(model)
    state, before = cache.state_dict(), other.codebooks
    books = state["codebooks"]
    for change in ({"codes": books["codes"][:-1]}, {"factors": [x[:1] for x in books["factors"]]}):
        with pytest.raises(ValueError, match="codebooks of the state"):
            other.load_state_dict(state | {"codebooks": books | change})
    with pytest.raises(ValueError, match="codebooks of the state"):
        other.load_state_dict(without(state, "codebooks", "factors"))
    assert other.codebooks is before
    assert other.get_seq_length() == 0
