"""What every registered cache must do. A new one is enrolled by its `@method(slot="cache")` and its line in `EXACT`.

A cache that needs more of the model than the keys and values that it is handed has `attached_to(model)`, a context
manager within which it is used. All have `nbytes`, `state_dict()` and `load_state_dict(state)`.
"""

import copy
import io
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from fairtrial.methods.registry import index

CACHES = [entry for entry in index() if entry.slot == "cache"]
EXACT = {  # settings with which nothing is lost
    "A2ATSCache": {"top_ratio": 1.0},
    "RotateKVCache": {"bits": 16},
    "cskv_cache": {"k_density": 1.0, "v_density": 1.0, "steps": 0},
    "PrefixKVCache": {"keep_ratio": 1.0},
    "XKVCache": {"rank_k": 256, "rank_v": 256},  # 4 layers of 2 heads of 32 channels
}
PROMPT, STEPS, LONG = 40, 8, 70

pytestmark = pytest.mark.parametrize("entry", CACHES, ids=[entry.name for entry in CACHES])


@pytest.fixture(scope="module")
def model(small_gpt):
    return small_gpt.model


@pytest.fixture(scope="module")
def text(small_gpt):
    """Two passages of as many tokens."""
    passages = ["The built-in function sorted returns a new list, and list.sort() ", "    for line in open(path): if "]
    ids = [small_gpt.tokenizer(passage * 12, return_tensors="pt").input_ids[:, :300] for passage in passages]
    return torch.cat(ids)


def calibration(text):
    return [text[:1, :128], text[1:, :96]]


def made(entry, model, text, *, exact=False):
    """The cache as a task makes it."""
    method = entry.load()
    setting = SimpleNamespace(
        model=model,
        config=model.config,
        calibration=calibration(text),
        generator=torch.Generator().manual_seed(0),
    )
    if exact:
        assert entry.name in EXACT, f"say in EXACT with which settings {entry.name} loses nothing"
    return method.factory(**{**method.bind(setting), **(EXACT[entry.name] if exact else {})})


def prepared(cache, model):
    return cache.attached_to(model) if hasattr(cache, "attached_to") else nullcontext()


@torch.no_grad()
def read(model, cache, ids, *, chunk=1):
    """Logits of what follows the prompt, which is read as a whole, and the rest a few tokens at a time."""
    with prepared(cache, model):
        parts = [ids[:, :PROMPT], *(ids[:, PROMPT:].split(chunk, 1) if ids.shape[1] > PROMPT else ())]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@torch.no_grad()
def step(model, cache, ids):
    with prepared(cache, model):
        return model(ids, past_key_values=cache).logits


def held(thing, seen=None):
    """All tensors that can be reached from an object, but for those of models."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, nn.Module | PreTrainedConfig | type | torch.Generator):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
    return [tensor for each in inside for tensor in held(each, seen)]


def bytes_in_memory(cache):
    """With all of the memory that tensors hold on to, be they views of something larger."""
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held(cache)}
    return sum(memory.values())


def test_without_compression_logits_are_those_of_the_plain_cache(entry, model, text):
    ids = text[:, : PROMPT + STEPS]
    for chunk in (1, 3):
        found = read(model, made(entry, model, text, exact=True), ids, chunk=chunk)
        torch.testing.assert_close(found, read(model, DynamicCache(), ids, chunk=chunk), rtol=0, atol=1e-4)


def test_the_bytes_that_it_reports_are_those_that_it_holds(entry, model, text):
    cache = made(entry, model, text)
    before = cache.nbytes
    assert before == bytes_in_memory(cache)
    for length in (PROMPT, PROMPT + 1, PROMPT + STEPS):
        cache.reset()
        read(model, cache, text[:, :length])
        assert cache.nbytes == bytes_in_memory(cache) > before


def test_it_counts_all_tokens_that_it_has_seen(entry, model, text):
    cache = made(entry, model, text)
    assert cache.get_seq_length() == 0
    for length in (PROMPT, PROMPT + 1, PROMPT + STEPS):
        cache.reset()
        read(model, cache, text[:, :length])
        assert cache.get_seq_length() == length


def test_a_batch_is_its_sequences_one_by_one(entry, model, text):
    model, ids = copy.deepcopy(model).double(), text[:, : PROMPT + STEPS]  # so that codes are rounded alike
    together = read(model, made(entry, model, text), ids)
    singles = [read(model, made(entry, model, text), ids[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(singles), rtol=0, atol=1e-4)


def test_two_runs_agree_and_leave_the_global_random_state_alone(entry, model, text):
    state = torch.get_rng_state()
    first, second = (read(model, made(entry, model, text), text[:, : PROMPT + STEPS]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_sequences_are_reordered_selected_and_repeated(entry, model, text):
    ids, following = text[:, : PROMPT + STEPS], text[:, PROMPT + STEPS :][:, :1]
    expected = step(model, filled(entry, model, text, ids), following)

    cache = filled(entry, model, text, ids)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(step(model, cache, following[[1, 0]]), expected[[1, 0]], rtol=1e-5, atol=1e-5)

    cache = filled(entry, model, text, ids)
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(step(model, cache, following[1:]), expected[1:], rtol=1e-5, atol=1e-5)

    cache = filled(entry, model, text, ids)
    cache.batch_repeat_interleave(2)
    twice = step(model, cache, following.repeat_interleave(2, 0))
    torch.testing.assert_close(twice, expected.repeat_interleave(2, 0), rtol=1e-5, atol=1e-5)
    assert cache.nbytes == bytes_in_memory(cache)


def filled(entry, model, text, ids, *, exact=False):
    cache = made(entry, model, text, exact=exact)
    read(model, cache, ids)
    return cache


@pytest.mark.parametrize("removed", [3, STEPS + 5])
def test_cropping_takes_the_last_tokens_back_or_is_refused(entry, model, text, removed):
    ids = text[:, : PROMPT + STEPS]
    cache = filled(entry, model, text, ids, exact=True)
    if not cache.is_croppable:
        with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
            cache.crop(-(PROMPT + STEPS - 1))
        assert cache.get_seq_length() == PROMPT + STEPS
        return
    cache.crop(-removed)
    plain = DynamicCache()
    read(model, plain, ids)
    plain.crop(-removed)
    assert cache.get_seq_length() == PROMPT + STEPS - removed
    assert cache.nbytes == bytes_in_memory(cache)
    again = ids[:, -removed:]
    torch.testing.assert_close(step(model, cache, again), step(model, plain, again), rtol=0, atol=1e-4)


def test_after_a_reset_it_is_as_new(entry, model, text):
    ids = text[:, : PROMPT + STEPS]
    cache = made(entry, model, text)
    empty = cache.nbytes
    first = read(model, cache, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == empty == bytes_in_memory(cache)
    assert torch.equal(read(model, cache, ids), first)


def test_it_goes_on_where_it_was_saved(entry, model, text):
    ids, following = text[:, : PROMPT + STEPS], text[:, PROMPT + STEPS :][:, :1]
    cache = filled(entry, model, text, ids)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded = made(entry, model, text)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.get_seq_length() == PROMPT + STEPS
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(step(model, loaded, following), step(model, cache, following))


def test_what_another_cache_saved_is_refused(entry, model, text):
    cache = filled(entry, model, text, text[:, :PROMPT])
    before = cache.nbytes
    for state in ({}, {"cache": "Another", "version": 0, "layers": []}):
        with pytest.raises(ValueError, match="state"):
            cache.load_state_dict(state)
    assert (cache.get_seq_length(), cache.nbytes) == (PROMPT, before)


@pytest.mark.parametrize("beams", [1, 3])
def test_without_compression_the_text_generated_is_that_of_the_plain_cache(entry, model, text, beams):
    ids, mask = text[:, :PROMPT].clone(), torch.ones(2, PROMPT, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0  # padding on the left
    if beams == 3:
        ids, mask = ids[1:], mask[1:]
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cache = made(entry, model, text, exact=True)
    with prepared(cache, model):
        found = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(ids, **options))


def test_a_long_text_is_generated(entry, model, text):
    cache = made(entry, model, text)
    with prepared(cache, model):
        found = model.generate(
            text[:, :PROMPT], past_key_values=cache, max_new_tokens=LONG, min_new_tokens=LONG, do_sample=False
        )
    assert found.shape == (2, PROMPT + LONG)
    assert cache.get_seq_length() == PROMPT + LONG - 1
    assert step(model, cache, found[:, -1:]).isfinite().all()


def test_the_model_is_left_as_it_was(entry, model, text):
    def parts():
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        return {name: (type(m), m.forward, *(len(getattr(m, h)) for h in hooks)) for name, m in model.named_modules()}

    before = parts()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read(model, made(entry, model, text), text[:, : PROMPT + 1])
    assert parts() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_half_precision(entry, model, text):
    half = copy.deepcopy(model).bfloat16()
    logits = read(half, made(entry, half, text), text[:, : PROMPT + STEPS])
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
