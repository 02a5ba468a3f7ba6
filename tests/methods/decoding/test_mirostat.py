"""Mirostat: fits and counts whose value is known, and a mean surprise that follows its target."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper

from fairtrial.methods.decoding import (
    MirostatLogitsProcessor,
    mirostat_generate,
    mirostat_k,
    sample,
    zipf_cross_entropy,
    zipf_exponent,
)

F64 = torch.float64
N = 50_000


def zipf(s, n=N):
    weights = torch.arange(1, n + 1, dtype=F64).pow(-s)
    return weights / weights.sum()


def drawn(seed, *shape, spread=3.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(logits, steps, *, seed=0, **options):
    """Surprises and limits along texts in which every token has the same logits."""
    processor, generator = MirostatLogitsProcessor(**options), torch.Generator().manual_seed(seed)
    ids, surprises, limits = torch.zeros(len(logits), 1, dtype=torch.long), [], []
    for _ in range(steps):
        kept = processor(ids, logits)
        limits.append(processor.mu)
        ids = torch.cat([ids, torch.multinomial(kept.softmax(-1), 1, generator=generator)], 1)
        surprises.append(processor.observe(ids))
    return torch.stack(surprises), torch.stack([*limits, processor.mu])


def test_the_fit_recovers_the_exponent_of_zipfs_law():
    for s in (1.1, 1.5):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        assert zipf_exponent(zipf(s)[order]).item() == pytest.approx(s, abs=1e-9)
    five = torch.tensor([0.3, 0.2, 0.1, 0.08, 0.05], dtype=F64)
    assert zipf_exponent(five, m=4).item() == pytest.approx(0.940517, abs=1e-6)
    holed = torch.cat([five, torch.zeros(4, dtype=F64)])
    assert zipf_exponent(holed, m=8).item() == pytest.approx(0.940517, abs=1e-6)


@pytest.mark.parametrize(("s", "mu", "k"), [(1.1, 6, 8), (1.5, 6, 10), (1.1, 3, 1), (1.5, 9, 40), (2.0, 6, 8)])
def test_how_many_tokens_are_kept(s, mu, k):
    found = mirostat_k(torch.tensor(s, dtype=F64), torch.tensor(mu, dtype=F64), N)
    assert found.round().item() == k


def test_how_many_tokens_in_the_limits():
    s = torch.tensor([1 - 1e-7, 1.0, 1 + 1e-7, 0.5, 1.3, 1e-9, 1.3], dtype=F64)
    mu = torch.tensor([5.0, 5.0, 5.0, 9.0, 5000.0, 20.0, -100.0], dtype=F64)
    k = mirostat_k(s, mu, N)
    torch.testing.assert_close(k[:3], torch.full((3,), 32 / math.log(N), dtype=F64), rtol=1e-5, atol=0)
    assert k[3].item() == pytest.approx((-0.5 * 512 / (1 - N**0.5)) ** 2)
    assert k[4:6].tolist() == pytest.approx([N, N])
    assert k[6] < 0.5
    assert mirostat_k(torch.tensor(math.inf), torch.tensor(5.0), N).item() == 1


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        (1.1, [2.847036, 4.206354, 5.736896, 7.172776, 9.323709]),
        (1.5, [1.380414, 2.732639, 3.724396, 4.240432, 4.553687]),
    ],
)
def test_cross_entropy_of_the_first_k(s, expected):
    assert [zipf_cross_entropy(s, N, k) for k in (1, 10, 100, 1000, N)] == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_is_nearly_linear_in_the_kept_mass():
    mass = zipf(1.1).cumsum(0)
    counts = [int((mass < p).sum()) + 1 for p in (0.2, 0.4, 0.6, 0.8, 0.9)]
    found = [zipf_cross_entropy(1.1, N, k) for k in counts]
    assert found == pytest.approx([3.1970, 4.4314, 5.7808, 7.3936, 8.3107], abs=1e-4)


@pytest.mark.parametrize("tau", [2.0, 3.0, 5.0])
def test_the_mean_surprise_goes_to_the_target(tau):
    surprises, limits = run(zipf(1.3).log()[None], 1000, tau=tau)
    assert surprises.mean().item() == pytest.approx(tau, abs=0.05)
    torch.testing.assert_close((surprises - tau).sum(0), limits[0] - limits[-1])


def test_the_second_version_goes_to_the_target_too():
    surprises, _ = run(zipf(1.3, 5000).log()[None], 1500, tau=3.0, version=2)
    assert surprises.mean().item() == pytest.approx(3.0, abs=0.05)


def test_a_target_below_the_likeliest_token_is_greedy_and_the_limit_is_held():
    probs = zipf(1.05)
    surprises, limits = run(probs.log()[None], 60, tau=2.0)
    assert surprises[-20:].flatten().tolist() == pytest.approx([-math.log2(probs[0])] * 20)
    assert -math.log2(probs[0]) == pytest.approx(3.16, abs=0.005)
    assert limits[-1].item() == -10


def test_without_learning_the_limit_stays():
    _, limits = run(drawn(0, 3, 400), 20, eta=0.0, tau=2.5)
    assert torch.all(limits == 5.0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), version=st.sampled_from([1, 2]), tau=st.floats(0.5, 6))
def test_errors_add_up_to_the_change_of_the_limit_in_every_row(seed, version, tau):
    surprises, limits = run(drawn(seed, 3, 300), 25, seed=seed, version=version, tau=tau)
    free = (limits > -10).all(0)
    eta = {1: 1.0, 2: 0.1}[version]
    total = (limits[0] - limits[-1]) / eta
    torch.testing.assert_close((surprises - tau).sum(0)[free], total[free])


def test_rows_do_not_touch_each_other():
    logits, ids = drawn(1, 3, 300), torch.tensor([[4], [9], [2]])
    following = torch.tensor([[7], [250], [3]])
    for version in (1, 2):
        together = MirostatLogitsProcessor(version=version)
        both = [together(ids, logits), together(torch.cat([ids, following], 1), logits)]
        for row in range(3):
            alone = MirostatLogitsProcessor(version=version)
            one = [alone(ids[[row]], logits[[row]])]
            one.append(alone(torch.cat([ids, following], 1)[[row]], logits[[row]]))
            torch.testing.assert_close(torch.stack(one)[:, 0], torch.stack(both)[:, row])


def test_version_two_keeps_what_does_not_exceed_the_limit():
    logits = drawn(2, 4, 200)
    kept = MirostatLogitsProcessor(tau=2.0, version=2)(torch.zeros(4, 1, dtype=torch.long), logits).isfinite()
    assert torch.equal(kept, logits.log_softmax(-1) >= -4 * math.log(2))
    low = MirostatLogitsProcessor(tau=1e-3, version=2)(torch.zeros(4, 1, dtype=torch.long), logits).isfinite()
    assert torch.equal(low.int().argmax(-1), logits.argmax(-1))
    assert torch.all(low.sum(-1) == 1)


def test_tokens_removed_before_do_not_count():
    logits = drawn(3, 2, 200)
    holed = torch.cat([logits, torch.full((2, 50), -math.inf, dtype=F64)], 1)
    ids = torch.zeros(2, 1, dtype=torch.long)
    for version in (1, 2):
        kept = MirostatLogitsProcessor(version=version)(ids, holed).isfinite()
        assert kept.any(-1).all()
        assert not kept[:, 200:].any()
    one = torch.full((1, 120), -math.inf, dtype=F64)
    one[0, 7] = 1.0
    assert MirostatLogitsProcessor()(ids[:1], one).isfinite().nonzero().tolist() == [[0, 7]]


def test_only_sampled_tokens_move_the_limit_and_new_prompts_begin_anew():
    logits = drawn(4, 1, 200)
    processor = MirostatLogitsProcessor()
    processor(torch.tensor([[1, 2, 3]]), logits)
    assert processor.mu.item() == 6
    processor(torch.tensor([[1, 2, 3, 50]]), logits)
    assert processor.mu.item() == pytest.approx(6 - (-logits.log_softmax(-1)[0, 50].item() / math.log(2) - 3))
    processor(torch.tensor([[1, 2, 3]]), logits)
    assert processor.mu.item() == 6
    with pytest.raises(ValueError, match=r"beam search is not possible with mirostat, and new prompts need reset\(\)"):
        processor(torch.tensor([[9, 2, 3, 4]]), logits)
    processor.reset()
    processor(torch.tensor([[9, 2, 3, 4]]), logits)


def test_beam_search_is_refused(small_gpt):
    model, tokenizer = small_gpt
    ids = tokenizer("The class statement", return_tensors="pt").input_ids
    beams = {"num_beams": 4, "do_sample": True, "max_new_tokens": 30, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="beam search"):
            model.generate(ids, logits_processor=[MirostatLogitsProcessor()], **beams)


@pytest.mark.parametrize("version", [1, 2])
def test_generation_reports_the_surprises_of_the_model(small_gpt, version):
    model, tokenizer = small_gpt
    ids = torch.tensor([tokenizer(text).input_ids[:18] for text in ("The class statement", "Binary operations: ")])
    options = {"max_new_tokens": 40, "eos_token_id": ()}
    found = mirostat_generate(
        model, ids, tau=1.5, version=version, generator=torch.Generator().manual_seed(0), **options
    )
    processor = MirostatLogitsProcessor(1.5, version=version)
    drawn_so = sample(model, ids, processors=[processor], generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(found.tokens, drawn_so)
    with torch.no_grad():
        log_p = model(found.tokens).logits[:, 17:-1].log_softmax(-1)
    again = -log_p.gather(-1, found.tokens[:, 18:, None])[..., 0] / math.log(2)
    torch.testing.assert_close(found.surprises, again, rtol=1e-3, atol=1e-3)
    end = int(found.tokens[0, 30])
    ended = mirostat_generate(
        model,
        ids[:1],
        tau=1.5,
        version=version,
        generator=torch.Generator().manual_seed(0),
        max_new_tokens=40,
        eos_token_id=[end, 10_000],
    )
    assert ended.surprises.isfinite().all()
    assert ended.tokens[0, -1] == end or ended.tokens.shape[1] == 58


def test_the_processor_goes_with_others_in_generate(small_gpt):
    model, tokenizer = small_gpt
    ids = tokenizer("The class statement", return_tensors="pt").input_ids
    processors = [TopKLogitsWarper(20), MirostatLogitsProcessor(tau=1.5)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = model.generate(
            ids, do_sample=True, max_new_tokens=10, logits_processor=processors, pad_token_id=0, num_return_sequences=2
        )
    assert found.shape == (2, ids.shape[1] + 10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tau": 0.0},
        {"tau": math.nan},
        {"eta": -1.0},
        {"eta": math.nan},
        {"m": 0},
        {"m": 2.5},
        {"m": True},
        {"version": 3},
        {"version": 1.0},
    ],
)
def test_misuse_is_refused_with_the_argument_named(arguments, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
        MirostatLogitsProcessor(**arguments)
    with pytest.raises(ValueError, match="m must be below the 50 tokens"):
        MirostatLogitsProcessor()(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 50))
    with pytest.raises(ValueError, match="m must be from 1 to 4"):
        zipf_exponent(torch.full((5,), 0.2), m=5)
    with pytest.raises(ValueError, match="k must be from 1 to 10"):
        zipf_cross_entropy(1.1, 10, 11)
    with pytest.raises(ValueError, match="observe must come after a call"):
        MirostatLogitsProcessor().observe(torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="k must be a whole number"):
        zipf_cross_entropy(1.1, 10, 2.5)
    with pytest.raises(ValueError, match="vocab must be a whole number"):
        mirostat_k(torch.tensor(1.1), torch.tensor(3.0), 10.5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_far_apart_keep_the_likeliest_token(version, dtype):
    logits = drawn(5, 2, 200).to(dtype)
    logits = logits * (torch.finfo(dtype).max / logits.abs().max() / 4)
    processor, ids = MirostatLogitsProcessor(version=version), torch.zeros(2, 1, dtype=torch.long)
    for _ in range(3):
        scores = processor(ids, logits)
        assert torch.all(scores.isfinite().sum(-1) == {1: 2, 2: 1}[version])  # round(k) + 1, or those within the limit
        assert torch.equal(scores.softmax(-1), logits.softmax(-1))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert processor.mu.isfinite().all()


@pytest.mark.parametrize("version", [1, 2])
def test_scores_that_are_no_distribution_are_refused(version):
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="scores must be a distribution"):
            MirostatLogitsProcessor(version=version)(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 200), wrong))


def test_a_copy_goes_on_by_itself():
    logits, ids = drawn(6, 1, 200).requires_grad_() * 1, torch.tensor([[1, 2]])
    processor = MirostatLogitsProcessor()
    processor(ids, logits)
    copied, longer = copy.deepcopy(processor), torch.tensor([[1, 2, 30]])
    assert torch.equal(copied(longer, logits), processor(longer, logits))
    copied.reset()
    assert processor.mu is not None
