"""What every registered decoder must do. A new one is enrolled by its `@method(slot="decoder")` alone."""

import math
import pickle
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from fairtrial.methods.decoding import sample
from fairtrial.methods.registry import index

DECODERS = [entry for entry in index() if entry.slot == "decoder"]
GREEDY = {  # hyperparameters with which a decoder takes the likeliest token
    "TopHLogitsProcessor": {"alpha": 1e-9},
    "MirostatLogitsProcessor": {"tau": 1e-9, "eta": 0.0, "version": 2},
    "SuperposedDecoding": {"num_drafts": 1, "ngram": None},
}
VOCABULARY = 256

each = pytest.mark.parametrize("entry", DECODERS, ids=lambda entry: entry.name)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def setting(small_gpt):
    """What a task tells a decoder, on the byte model and a few pages of its text."""
    model, tokenizer = small_gpt
    corpus = torch.tensor(tokenizer("\n".join(topics[name] for name in ("class", "lists", "for"))).input_ids)
    return SimpleNamespace(model=model, tokenizer=tokenizer, corpus=corpus, generator=generator(0), temperature=1.5)


def build(entry, setting, **options):
    """The decoder as a task makes it."""
    method = entry.load()
    bound = {name: value for name, value in method.bind(setting).items() if name not in options}
    return method.factory(**bound, **options)


def is_processor(decoder) -> bool:
    return isinstance(decoder, LogitsProcessor)


def processor_of(entry):
    """The decoder, if it is a logits processor."""
    decoder = build(entry, SimpleNamespace(model=None, tokenizer=None, corpus=torch.arange(9), generator=None))
    return decoder if is_processor(decoder) else None


def text_of(decoder, setting, ids, mask, length=12, seed=0):
    """Prompts and their continuations, as tasks make them: a temperature comes first."""
    if not is_processor(decoder):
        return decoder(setting.model, ids, mask, length, generator(seed))
    return sample(
        setting.model,
        ids,
        mask,
        max_new_tokens=length,
        processors=[TemperatureLogitsWarper(setting.temperature), decoder],
        generator=generator(seed),
        eos_token_id=(),
    )


def prompts(tokenizer, *texts):
    rows = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def drawn(seed, rows, spread, holes):
    """Random logits, some of which other processors have removed."""
    logits = spread * torch.randn(rows, VOCABULARY, generator=generator(seed), dtype=torch.float64)
    gone = torch.rand(rows, VOCABULARY, generator=generator(seed + 1)) < holes
    gone[:, seed % VOCABULARY] = False
    return logits.masked_fill(gone, -math.inf)


@each
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.01, 30),
    holes=st.sampled_from([0.0, 0.3, 0.95]),
)
def test_the_kept_set_is_of_the_likeliest_tokens_and_nothing_else_is_drawn(entry, seed, spread, holes):
    processor = processor_of(entry)
    if processor is None:
        return
    logits, ids = drawn(seed, 3, spread, holes), torch.zeros(3, 1, dtype=torch.long)
    for step in range(4):
        before = logits.clone()
        scores = processor(ids, logits)
        assert torch.equal(logits, before)
        kept = scores.isfinite()
        assert torch.equal(scores[kept], logits[kept])
        least = scores.masked_fill(~kept, math.inf).amin(-1)
        others = logits.masked_fill(kept, -math.inf).amax(-1)
        assert torch.all(kept.any(-1))
        assert torch.all(least >= others)
        tokens = torch.multinomial(scores.softmax(-1), 20, True, generator=generator(step))
        assert kept.gather(-1, tokens).all()
        ids = torch.cat([ids, tokens[:, :1]], 1)


@each
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_rows_of_a_batch_are_what_they_are_alone(entry, seed):
    together = processor_of(entry)
    if together is None:
        return
    alone = [processor_of(entry) for _ in range(3)]
    ids = torch.zeros(3, 1, dtype=torch.long)
    for step in range(4):
        logits = drawn(seed + step, 3, 3.0, 0.1)
        scores = together(ids, logits)
        for row, processor in enumerate(alone):
            assert torch.equal(processor(ids[[row]], logits[[row]])[0], scores[row])
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)


@each
def test_the_greedy_limit_is_greedy(entry, setting):
    ids, mask = prompts(setting.tokenizer, "The class statement", "Lists may be constructed in")
    greedy = sample(setting.model, ids, mask, max_new_tokens=12, processors=[TopKLogitsWarper(1)], eos_token_id=())
    assert torch.equal(text_of(build(entry, setting, **GREEDY[entry.name]), setting, ids, mask), greedy)


@each
def test_a_seed_gives_one_text_and_no_global_random_state_is_touched(entry, setting):
    ids, mask = prompts(setting.tokenizer, "The class statement", "A list display")
    before = torch.get_rng_state()
    texts = [text_of(build(entry, setting), setting, ids, mask, seed=7) for _ in range(2)]
    assert torch.equal(*texts)
    again = build(entry, setting)
    for _ in range(2):  # a decoder may be used for one text after the other
        assert torch.equal(text_of(again, setting, ids, mask, seed=7), texts[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0].shape == (2, ids.shape[1] + 12)
    assert torch.equal(texts[0][:, : ids.shape[1]], ids)


@each
def test_padding_on_the_left_changes_nothing(entry, setting):
    ids, mask = prompts(setting.tokenizer, "The class statement")
    padded = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    plain = text_of(build(entry, setting), setting, ids, mask)
    assert torch.equal(text_of(build(entry, setting), setting, *padded)[:, 5:], plain)
    assert torch.equal(text_of(build(entry, setting), setting, ids, torch.ones_like(ids)), plain)


@each
def test_in_its_greedy_limit_a_batch_is_its_prompts_one_by_one(entry, setting):
    ids, mask = prompts(setting.tokenizer, "The class statement", "Lists may be constructed in")
    options = GREEDY[entry.name]
    together = text_of(build(entry, setting, **options), setting, ids, mask)
    for row in range(2):
        own = mask[row].bool()
        alone = text_of(build(entry, setting, **options), setting, ids[[row]][:, own], mask[[row]][:, own])
        assert torch.equal(alone[0], together[row, -alone.shape[1] :])


@each
def test_every_searched_hyperparameter_works_to_the_ends_of_its_range(entry, setting):
    ids, mask = prompts(setting.tokenizer, "The class statement")
    for name, space in entry.load().search.items():
        for value in (space.low, space.high):
            text = text_of(build(entry, setting, **{name: value}), setting, ids, mask, length=4)
            assert text.shape[1] == ids.shape[1] + 4


@each
def test_a_decoder_can_be_sent_to_another_process(entry, setting):
    ids, mask = prompts(setting.tokenizer, "The class statement")
    decoder = build(entry, setting)
    copied = pickle.loads(pickle.dumps(decoder))
    assert torch.equal(text_of(copied, setting, ids, mask), text_of(decoder, setting, ids, mask))


def test_the_greedy_limits_are_of_registered_decoders():
    assert set(GREEDY) == {entry.name for entry in DECODERS}
