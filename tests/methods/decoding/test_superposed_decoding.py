"""Superposed decoding: step by step on given distributions, and against greedy decoding of a real model."""

import gc
import math
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cosine_similarity

from fairtrial.methods.decoding import (
    NGramInterpolator,
    SuperposedDecoding,
    superposed_generate,
    superposition_weights,
)
from fairtrial.methods.registry import index

TEXTS = ("The class statement", "An expression list containing")


class Scripted(nn.Module):
    """A language model whose distribution depends on the step alone, and whose embeddings are one-hot."""

    def __init__(self, *steps: dict[int, float], vocabulary: int = 40, end: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.eye(vocabulary, dtype=torch.float64))
        self.steps, self.calls, self.mixtures, self.vocabulary = steps, 0, [], vocabulary
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.generation_config = SimpleNamespace(eos_token_id=end, pad_token_id=None)
        self.device = torch.device("cpu")

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, past_key_values=None, use_cache=True):
        probs = torch.zeros(self.vocabulary, dtype=torch.float64)
        step = self.steps[min(self.calls, len(self.steps) - 1)]
        probs[list(step)] = torch.tensor(list(step.values()), dtype=torch.float64)
        self.calls += 1
        if inputs_embeds is not None:
            self.mixtures.append(inputs_embeds[0, 0])
        rows = len(attention_mask)
        return SimpleNamespace(logits=probs.log().expand(rows, 1, -1), past_key_values=())


FIRST = {20: 0.5, 21: 0.3, 22: 0.15, 23: 0.05}
SECOND = {30: 0.6, 31: 0.3, 32: 0.08, 33: 0.02}
COUNTED = [[10, 11, 21], [11, 20, 30], [11, 20], [11, 20], [20, 31], *[[21, 31]] * 3, [21, 32]]


def counted(*orders_and_weights):
    return NGramInterpolator(*orders_and_weights).fit([torch.tensor(text) for text in COUNTED])


def close(found, expected):
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def mixture(**weights):
    row = torch.zeros(40, dtype=torch.float64)
    for token, weight in weights.items():
        row[int(token[1:])] = weight
    return row


def test_a_trace_without_n_grams():
    options = {"num_drafts": 2, "n_candidates": 3, "temperature": 1.0}
    prompt = torch.tensor([[10, 11]])
    one = superposed_generate(Scripted(FIRST), prompt, max_new_tokens=1, **options)
    assert one.sequences.tolist() == [[[10, 11, 20], [10, 11, 21]]]
    close(one.scores, [[-0.641854, -1.152680]])
    model = Scripted(FIRST, SECOND, FIRST)
    two = superposed_generate(model, prompt, max_new_tokens=2, **options)
    assert two.sequences.tolist() == [[[10, 11, 20, 30], [10, 11, 21, 30]]]
    close(two.scores, [[-1.132477, -1.643302]])
    close(model.mixtures[0], mixture(t20=0.625, t21=0.375).tolist())
    close(superposition_weights(two.scores, two.sequences[..., -1], 40)[0], mixture(t30=1.0).tolist())
    torch.testing.assert_close(two.perplexities, (-two.scores / 2).exp())


def test_a_trace_with_n_grams():
    options = {"num_drafts": 2, "n_candidates": 3, "temperature": 1.0, "alpha": 0.5}
    options["ngram"] = counted((1, 2), (0.4, 0.6))
    prompt = torch.tensor([[10, 11]])
    one = superposed_generate(Scripted(FIRST), prompt, max_new_tokens=1, **options)
    assert one.sequences[..., -1].tolist() == [[21, 20]]
    close(one.scores, [[-0.754677, -0.922913]])
    model = Scripted(FIRST, SECOND)
    two = superposed_generate(model, prompt, max_new_tokens=2, **options)
    assert two.sequences[..., 2:].tolist() == [[[20, 30], [21, 31]]]
    close(two.scores, [[-1.279797, -1.948549]])
    torch.testing.assert_close(model.mixtures[0], mixture(t21=0.54196, t20=0.45804), atol=1e-5, rtol=0)
    weights = superposition_weights(two.scores, two.sequences[..., -1], 40)[0].double()
    close(weights, mixture(t30=0.661224, t31=0.338776).tolist())


def test_n_grams_are_counted():
    model = counted((1, 2), (0.4, 0.6))
    context, tokens = torch.tensor([10, 11]), torch.tensor([20, 21, 22, 39])
    torch.testing.assert_close(model.prob(context, tokens), torch.tensor([0.4 * 0.75, 0.4 * 0.25 + 0.6, 0, 0]))
    unseen = model.prob(torch.tensor([[-1, 11], [11, -1], [39, 39]]), tokens.expand(3, 4))
    torch.testing.assert_close(unseen, torch.tensor([[0.3, 0.1, 0, 0], [0.0] * 4, [0.0] * 4]))
    short = model.prob(torch.tensor([11]), tokens[:2])  # no room for a trigram
    torch.testing.assert_close(short, torch.tensor([0.3, 0.1]))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_probabilities_are_shares_of_what_followed(seed):
    text = torch.randint(4, (60,), generator=torch.Generator().manual_seed(seed))
    model, tokens = NGramInterpolator((1, 3, 2), (0.2, 0.5, 0.3)).fit(text), text.tolist()
    context = text[7:10]
    expected = torch.zeros(4)
    for n, weight in zip(model.orders, model.weights, strict=True):
        following = [tokens[i + n] for i in range(60 - n) if tokens[i : i + n] == tokens[10 - n : 10]]
        expected += weight * torch.bincount(torch.tensor(following), minlength=4) / len(following)
    torch.testing.assert_close(model.prob(context, torch.arange(4)), expected)
    assert expected.sum().item() == pytest.approx(1.0)


def test_n_grams_do_not_cross_from_text_to_text():
    model = NGramInterpolator((1,), (1.0,)).fit([torch.tensor([1, 2]), torch.tensor([3, 4])])
    assert model.prob(torch.tensor([2]), torch.tensor([3])).item() == 0
    assert model.prob(torch.tensor([3]), torch.tensor([4])).item() == 1


def test_a_saved_model_is_the_same_and_other_files_are_refused(tmp_path):
    model = counted()
    model.save(tmp_path / "counts")
    loaded = NGramInterpolator.load(tmp_path / "counts")
    context, tokens = torch.tensor([10, 11, 20]), torch.arange(40)
    assert torch.equal(loaded.prob(context, tokens), model.prob(context, tokens))
    assert (loaded.orders, loaded.weights) == (model.orders, model.weights)
    torch.save({"weights": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other must hold 'fairtrial n-grams 1', got None"):
        NGramInterpolator.load(tmp_path / "other")


def prompts(tokenizer):
    rows = [tokenizer(text).input_ids for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_one_draft_is_greedy_decoding(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    drafts = superposed_generate(model, ids, mask, num_drafts=1, max_new_tokens=25, eos_token_id=())
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False, pad_token_id=0)
    assert torch.equal(drafts.sequences[:, 0], greedy)
    with_end = superposed_generate(model, ids, mask, num_drafts=1, max_new_tokens=25, eos_token_id=int(greedy[0, -5]))
    assert with_end.sequences[0, 0].tolist()[:12] == greedy[0].tolist()[:12]


def corpus(tokenizer):
    from pydoc_data.topics import topics

    return torch.tensor(tokenizer("\n".join(topics[name] for name in ("class", "lists", "exprlists"))).input_ids)


def test_a_batch_is_its_prompts_one_by_one(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    for ngram in (None, NGramInterpolator().fit(corpus(tokenizer))):
        options = {"max_new_tokens": 15, "ngram": ngram, "eos_token_id": ()}
        together = superposed_generate(model, ids, mask, **options)
        for row in range(len(ids)):
            alone = superposed_generate(model, ids[[row]][:, mask[row].bool()], **options)
            torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-3, atol=1e-2)
            assert torch.equal(alone.sequences[0, :, -15:], together.sequences[row, :, -15:])


def test_as_many_calls_as_tokens_and_scores_only_fall():
    rows = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)).tolist()
    steps, scores = [dict(zip(range(20, 30), row, strict=True)) for row in rows], []
    for length in range(1, 7):
        model = Scripted(*steps)
        scores.append(superposed_generate(model, torch.tensor([[1]]), max_new_tokens=length, temperature=1.0).scores)
        assert model.calls == length
    assert all(torch.all(later <= earlier) for earlier, later in pairwise(scores))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_mixtures_add_up_to_one(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    scores[0, 1:] = -math.inf
    tokens = torch.randint(6, (3, 4), generator=generator)
    weights = superposition_weights(scores, tokens, 6)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert weights[0, tokens[0, 0]] == 1
    same = superposition_weights(scores, torch.full((3, 4), 2), 6)
    torch.testing.assert_close(same, torch.eye(6, dtype=torch.float64)[[2, 2, 2]])


def test_without_weight_the_n_grams_are_not_asked():
    prompt, options = torch.tensor([[10, 11]]), {"max_new_tokens": 2, "temperature": 1.0, "num_drafts": 2}
    plain = superposed_generate(Scripted(FIRST, SECOND), prompt, n_candidates=3, **options)
    never = superposed_generate(Scripted(FIRST, SECOND), prompt, n_candidates=3, ngram=counted(), alpha=0.0, **options)
    for found, expected in zip(never, plain, strict=True):
        assert torch.equal(found, expected)


def test_a_draft_that_nothing_goes_on_from_is_penalised():
    model = Scripted(FIRST)
    unseen = NGramInterpolator((1,), (1.0,)).fit(torch.tensor([1, 2]))
    options = {"num_drafts": 2, "n_candidates": 3, "temperature": 1.0, "max_new_tokens": 1, "alpha": 0.25}
    found = superposed_generate(model, torch.tensor([[10, 11]]), ngram=unseen, penalty=50.0, **options)
    close(found.scores, [[0.75 * math.log(0.5 / 0.95) - 50, 0.75 * math.log(0.3 / 0.95) - 50]])


def test_fewer_possible_continuations_leave_fewer_drafts():
    only = NGramInterpolator((1,), (1.0,)).fit(torch.tensor([11, 20]))
    options = {"num_drafts": 2, "n_candidates": 3, "temperature": 1.0, "ngram": only, "alpha": 0.5}
    found = superposed_generate(Scripted(FIRST), torch.tensor([[10, 11]]), max_new_tokens=1, **options)
    assert found.scores[0].isfinite().tolist() == [True, False]
    assert found.sequences[0, 0].tolist() == [10, 11, 20]
    assert found.perplexities[0, 1] == math.inf


def test_finished_drafts_stay_and_the_others_go_on():
    model = Scripted({7: 0.5, 20: 0.3, 21: 0.2}, {20: 0.5, 21: 0.3, 7: 0.2}, end=7)
    found = superposed_generate(
        model, torch.tensor([[10, 11]]), num_drafts=2, n_candidates=3, temperature=1.0, max_new_tokens=3
    )
    assert model.calls == 3
    assert found.sequences[0].tolist() == [[10, 11, 7, 7, 7], [10, 11, 20, 20, 20]]
    assert found.lengths.tolist() == [[1, 3]]
    torch.testing.assert_close(found.perplexities[0], torch.tensor([2.0, 0.075 ** (-1 / 3)], dtype=torch.float64))
    all_end = Scripted({7: 1.0, 20: 0.0, 21: 0.0}, end=7)
    ended = superposed_generate(all_end, torch.tensor([[10]]), num_drafts=1, n_candidates=2, max_new_tokens=9)
    assert all_end.calls == 1
    assert ended.sequences.tolist() == [[[10, 7]]]


def test_the_slot_gives_the_best_draft(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    text = corpus(tokenizer)
    decoder = SuperposedDecoding(NGramInterpolator().fit(text), num_drafts=2)
    drafts = superposed_generate(model, ids, mask, max_new_tokens=8, num_drafts=2, ngram=NGramInterpolator().fit(text))
    assert torch.equal(decoder(model, ids, mask, 8, torch.Generator()), drafts.sequences[:, 0])


def test_a_mixture_goes_through_the_layers_nearly_as_its_parts(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("Lists may be constructed in", return_tensors="pt").input_ids
    following = tokenizer(" several many different").input_ids
    embeddings = model.get_input_embeddings()
    before = embeddings(ids).expand(len(following), -1, -1)
    parts = torch.cat([before, embeddings(torch.tensor(following))[:, None]], 1)
    with torch.no_grad():
        states = model(
            inputs_embeds=torch.cat([parts, parts.mean(0, keepdim=True)]), output_hidden_states=True
        ).hidden_states
    likeness = [cosine_similarity(state[-1, -1], state[:-1, -1].mean(0), dim=0).item() for state in states]
    assert likeness[0] == pytest.approx(1, abs=1e-5)
    assert min(likeness) > 0.95


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_drafts": 0},
        {"num_drafts": 2.5},
        {"num_drafts": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"n_candidates": 4.5},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"n_candidates": 3},
        {"alpha": 1.5, "ngram": counted()},
        {"alpha": 0.5},
        {"penalty": -1.0},
    ],
)
def test_misuse_is_refused_with_the_argument_named(arguments, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
        superposed_generate(Scripted(FIRST), torch.tensor([[1]]), **{"max_new_tokens": 2, **arguments})
    if "max_new_tokens" not in arguments:
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            SuperposedDecoding(**arguments)


def test_unsuitable_models_and_texts_are_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    model = Scripted(FIRST)
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="model must be a decoder alone"):
        superposed_generate(model, torch.tensor([[1]]), max_new_tokens=1)
    wrong_settings = ({"orders": ()}, {"orders": (0,)}, {"orders": (1, 1)}, {"orders": (1.5,)}, {"weights": (1.0,)})
    for wrong in wrong_settings:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NGramInterpolator(**wrong)
    with pytest.raises(ValueError, match="texts of at least 2 tokens"):
        NGramInterpolator().fit([torch.tensor([1])])
    for wrong in (torch.tensor([1.0, 2.5]), torch.tensor([[1, 2], [3, 4]])):
        with pytest.raises(ValueError, match="token_sequences must be texts"):
            NGramInterpolator().fit(wrong)
    with pytest.raises(ValueError, match="of token ids from 0"):
        NGramInterpolator().fit(torch.tensor([1, -2, 3]))
    with pytest.raises(ValueError, match="called after fit"):
        NGramInterpolator().prob(torch.tensor([1]), torch.tensor([2]))


def test_a_task_counts_its_corpus_once_and_does_not_keep_it(monkeypatch):
    fits = []
    fit = NGramInterpolator.fit

    def noted(self, tokens):
        fits.append(len(tokens))
        return fit(self, tokens)

    monkeypatch.setattr(NGramInterpolator, "fit", noted)
    setting = SimpleNamespace(corpus=torch.arange(9))
    bind = next(entry for entry in index() if entry.name == "SuperposedDecoding").load().bind
    first, again = bind(setting)["ngram"], bind(setting)["ngram"]
    assert first is again
    other = bind(SimpleNamespace(corpus=torch.arange(9)))["ngram"]
    assert other is not first
    assert fits == [9, 9]
    model = weakref.ref(first)
    del first, again, setting
    gc.collect()
    assert model() is None


def test_impossible_tokens_do_not_matter_where_the_n_grams_decide_alone():
    only = NGramInterpolator((1,), (1.0,)).fit(torch.tensor([11, 22]))
    model = Scripted({20: 1.0, 21: 0.0, 22: 0.0})
    options = {"num_drafts": 1, "n_candidates": 40, "temperature": 1.0, "ngram": only, "alpha": 1.0}
    found = superposed_generate(model, torch.tensor([[10, 11]]), max_new_tokens=1, **options)
    assert found.sequences[0, 0].tolist() == [10, 11, 22]
    assert found.scores.tolist() == [[0.0]]


def test_texts_may_be_shorter_than_the_longest_context():
    model = NGramInterpolator().fit(torch.tensor([1, 2, 3]))
    context, token = torch.tensor([-1, -1, -1, 1, 2]), torch.tensor([3])
    assert model.prob(context, token).item() == pytest.approx(0.01 + 0.04)


@pytest.mark.parametrize("damage", [lambda held: held[: len(held) // 2], lambda held: b"text" * 100])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "ngrams"
    NGramInterpolator().fit(torch.arange(20)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged, or no file of n-grams"):
        NGramInterpolator.load(path)
    with pytest.raises(FileNotFoundError):
        NGramInterpolator.load(tmp_path / "missing")


def test_a_model_that_gives_no_numbers_is_refused():
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scores that are not numbers"):
            superposed_generate(Scripted({0: wrong}), torch.tensor([[1, 2]]), max_new_tokens=2)
