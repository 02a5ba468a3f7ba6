"""Top-H: the paper's rule and the authors' code's, on distributions whose answer is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, TopHLogitsWarper

from fairtrial.methods.decoding import TopHLogitsProcessor, ecmm_bruteforce, top_h_mask
from fairtrial.methods.decoding.top_h import FIRST_LOOK

F64 = torch.float64
P = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], dtype=F64)
NOTHING = torch.zeros(1, 1, dtype=torch.long)


def drawn(seed, *shape, spread=3.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def renormalised(p, kept):
    q = p * kept
    return q / q.sum(-1, keepdim=True)


def test_entropies_of_the_worked_example():
    assert entropy(P).item() == pytest.approx(1.525476, abs=1e-6)
    partial = -torch.special.xlogy(P, P).cumsum(0)
    expected = [0.366516, 0.713090, 0.997658, 1.227916, 1.396721, 1.525476]
    torch.testing.assert_close(partial, torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)
    prefixes = [entropy(P[:k] / P[:k].sum()).item() for k in range(1, 7)]
    assert prefixes == pytest.approx([0, 0.666278, 1.023929, 1.258991, 1.414096, 1.525476], abs=1e-6)


@pytest.mark.parametrize("criterion", ["renormalized", "partial"])
@pytest.mark.parametrize(("alpha", "count"), [(0.2, 1), (0.4, 1), (0.6, 2), (0.8, 3), (0.99, 5), (1.0, 6)])
def test_kept_tokens_of_the_worked_example(criterion, alpha, count):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    kept = top_h_mask(P[order], alpha, criterion)
    assert kept.tolist() == [rank < count for rank in order.tolist()]


@pytest.mark.parametrize(("criterion", "counts"), [("renormalized", [1, 2, 3, 5]), ("partial", [2, 3, 4, 6])])
def test_of_equally_likely_tokens_a_power_or_a_share_is_kept(criterion, counts):
    uniform = torch.full((8,), 1 / 8, dtype=F64)
    found = [int(top_h_mask(uniform, alpha, criterion).sum()) for alpha in (0.3, 0.4, 0.55, 0.8)]
    assert found == counts


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.05, 0.95), spread=st.floats(0.1, 6))
def test_the_kept_entropy_is_within_the_bound_and_never_falls_with_more_tokens(seed, alpha, spread):
    p = drawn(seed, 3, 40, spread=spread).softmax(-1)
    kept = top_h_mask(p, alpha)
    bound = alpha * entropy(p)
    assert torch.all((entropy(renormalised(p, kept)) <= bound + 1e-12) | (kept.sum(-1) == 1))
    ordered = p.sort(descending=True).values
    mass = ordered.cumsum(-1)
    of_prefix = -torch.special.xlogy(ordered, ordered).cumsum(-1) / mass + mass.log()
    assert torch.all(of_prefix.diff(dim=-1) >= -1e-12)
    count = kept.sum(-1)
    following = of_prefix.gather(-1, count[:, None].clamp(max=39))[:, 0]
    assert torch.all((following > bound - 1e-12) | (count == 40))


def test_the_partial_criterion_can_exceed_the_bound():
    uniform = torch.full((100,), 0.01, dtype=F64)
    kept = top_h_mask(uniform, 0.401, "partial")
    assert entropy(renormalised(uniform, kept)).item() == pytest.approx(math.log(40))
    assert math.log(40) > 0.401 * math.log(100)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), criterion=st.sampled_from(["renormalized", "partial"]))
def test_shifts_change_nothing_and_permutations_permute(seed, criterion):
    logits = drawn(seed, 2, 30)
    processor = TopHLogitsProcessor(0.5, criterion)
    scores = processor(NOTHING.expand(2, 1), logits)
    assert torch.equal(processor(NOTHING.expand(2, 1), logits + 7).isfinite(), scores.isfinite())
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(processor(NOTHING.expand(2, 1), logits[:, order]), scores[:, order])
    assert torch.equal(scores[scores.isfinite()], logits[scores.isfinite()])


def test_certain_distributions_keep_one_and_alpha_one_keeps_all():
    one_hot = torch.eye(5, dtype=F64)
    for criterion in ("renormalized", "partial"):
        assert torch.equal(top_h_mask(one_hot, 0.7, criterion), one_hot.bool())
        logits = drawn(0, 1, 50).float()
        logits[0, 3] = -math.inf
        assert torch.equal(TopHLogitsProcessor(1.0, criterion)(NOTHING, logits), logits)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.6, 0.8])
def test_tokens_by_probability_keep_nearly_the_best_mass(alpha):
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(150):
        p = torch.empty(8, dtype=F64).exponential_(generator=generator)
        p = p / p.sum()
        ratios.append((p[top_h_mask(p, alpha)].sum() / p[ecmm_bruteforce(p, alpha)].sum()).item())
    assert max(ratios) <= 1 + 1e-9
    assert sum(ratios) / 150 >= 0.9


@pytest.mark.parametrize("vocabulary", [60, 5000])
@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.9])
def test_the_partial_criterion_is_that_of_transformers(vocabulary, alpha):
    for spread in (0.5, 2.0, 5.0):
        logits = drawn(1, 4, vocabulary, spread=spread).float()
        ids = NOTHING.expand(4, 1)
        assert torch.equal(TopHLogitsProcessor(alpha, "partial")(ids, logits), TopHLogitsWarper(alpha)(ids, logits))


def test_a_kept_set_beyond_the_first_look_is_found_whole():
    logits = drawn(2, 2, 5000, spread=0.1)
    kept = TopHLogitsProcessor(0.95)(NOTHING.expand(2, 1), logits).isfinite()
    assert torch.all(kept.sum(-1) > FIRST_LOOK)
    p = logits.softmax(-1)
    assert torch.all(entropy(renormalised(p, kept)) <= 0.95 * entropy(p))
    few = TopHLogitsProcessor(0.95, top_n=7)(NOTHING.expand(2, 1), logits)
    assert few.isfinite().sum(-1).tolist() == [7, 7]


def test_the_kept_set_is_that_of_the_tempered_distribution():
    logits = drawn(3, 2, 200)
    ids = NOTHING.expand(2, 1)
    hot = TopHLogitsProcessor(temperature=2.0)(ids, logits)
    torch.testing.assert_close(hot / 2, TopHLogitsProcessor()(ids, logits / 2))
    more = TopHLogitsProcessor(min_tokens_to_keep=9)(ids, 10 * logits)
    assert more.isfinite().sum(-1).tolist() == [9, 9]
    floor = TopHLogitsProcessor(filter_value=-50.0)(ids, logits)
    assert floor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    logits = drawn(4, 2, 300).to(dtype)
    scores = TopHLogitsProcessor()(NOTHING.expand(2, 1), logits)
    assert scores.dtype == dtype
    assert torch.equal(scores.isfinite(), TopHLogitsProcessor()(NOTHING.expand(2, 1), logits.float()).isfinite())


def test_generate_takes_it_with_a_configuration_temperature_and_beams(small_gpt):
    model, tokenizer = small_gpt
    ids = tokenizer("The class statement", return_tensors="pt").input_ids
    config = GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=12, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        narrow = [TopHLogitsProcessor(0.01, temperature=2.0)]
        greedy = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(model.generate(ids, config, logits_processor=narrow), greedy)
        beams = model.generate(ids, config, logits_processor=[TopHLogitsProcessor()], num_beams=2)
        assert beams.shape[1] == ids.shape[1] + 12


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"alpha": math.nan},
        {"criterion": "whole"},
        {"top_n": 0},
        {"top_n": 2.5},
        {"top_n": True},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"filter_value": math.nan},
        {"filter_value": math.inf},
        {"min_tokens_to_keep": 0},
        {"min_tokens_to_keep": 1.5},
    ],
)
def test_misuse_is_refused_with_the_argument_named(arguments, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TopHLogitsProcessor(**arguments)
    with pytest.raises(ValueError, match="alpha must be within"):
        top_h_mask(P, 0.0)
    with pytest.raises(ValueError, match="probs must be of 1 to 16 tokens"):
        ecmm_bruteforce(torch.full((20,), 0.05), 0.4)


def test_of_equally_likely_tokens_no_more_are_kept_than_asked_for():
    for logits in (torch.tensor([[3.0, 2, 2, 2, 1]]), torch.zeros(1, 9)):
        for alpha in (0.99, 1.0):
            kept = TopHLogitsProcessor(alpha, top_n=2)(NOTHING, logits).isfinite()
            assert 1 <= kept.sum() <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("criterion", ["renormalized", "partial"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 5e-324])
def test_tiny_temperatures_keep_the_likeliest_token(temperature, criterion, dtype):
    logits = 10 * torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    logits = logits.to(dtype).masked_fill(logits == 0, -math.inf)
    logits[:, 7] = 5000
    scores = TopHLogitsProcessor(0.4, criterion, temperature=temperature)(NOTHING.expand(3, 1), logits)
    assert scores.isfinite().nonzero().tolist() == [[row, 7] for row in range(3)]
    assert torch.equal(scores[:, 7], logits[:, 7])


def test_a_filter_value_that_the_dtype_has_not_becomes_its_lowest_number():
    logits = drawn(4, 2, 300).half()
    ids = NOTHING.expand(2, 1)
    kept = TopHLogitsProcessor()(ids, logits).isfinite()
    scores = TopHLogitsProcessor(filter_value=-1e9)(ids, logits)
    assert torch.equal(scores, logits.masked_fill(~kept, torch.finfo(torch.float16).min))
