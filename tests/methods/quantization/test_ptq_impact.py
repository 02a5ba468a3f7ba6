"""Formats for whole models, and how temperature acts on what they change."""

import copy

import pytest
import torch
from torch import nn

from fairtrial.methods.quantization import (
    WeightFormat,
    apply_ptq,
    format_layers,
    generation_sweep,
    quantize_,
    temperature_divergence,
    temperature_sensitivity,
)
from fairtrial.methods.quantization.ptq_impact import Drawn, left_padded, likelihoods, sample

PROMPTS = ["The import statement", "A list", "If no exception"]


def scores(seed: int) -> torch.Tensor:
    return torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_that_of_its_definition() -> None:
    ref, q = scores(0), scores(1)
    found = temperature_divergence(ref, q, [0.5, 1.0])
    assert found.shape == (2, 3, 5)
    p = (ref / 0.5).softmax(-1)
    torch.testing.assert_close(found[0], (p * ((ref / 0.5).log_softmax(-1) - (q / 0.5).log_softmax(-1))).sum(-1))
    assert (found > 0).all()
    torch.testing.assert_close(temperature_divergence(ref + 5, q - 2, [0.5, 1.0]), found, atol=1e-5, rtol=1e-4)
    assert temperature_divergence(ref, ref, [0.1, 1.0, 9.0]).abs().max() < 1e-6
    few, almost = (ref.masked_fill(ref < 0.5, low) for low in (-float("inf"), -1e4))
    torch.testing.assert_close(temperature_divergence(few, q, [1.0]), temperature_divergence(almost, q, [1.0]))
    assert not temperature_divergence(few, few, [1.0]).any()
    assert (temperature_divergence(ref, few, [1.0]) == float("inf")).all()


def test_divergence_falls_with_the_square_of_large_temperatures() -> None:
    hot = temperature_divergence(scores(0).double(), scores(1).double(), [100.0, 200.0, 1e6]).mean((1, 2))
    assert (hot[0] / hot[1]).item() == pytest.approx(4, rel=0.02)
    assert hot[2] < 1e-11


def test_sensitivity_is_made_of_slopes_around_the_zone() -> None:
    temperatures = [0.2, 0.5, 0.65, 0.8, 1.0]
    values = torch.tensor([[0.0, 1.0], [0.3, -4.0], [9.0, 0.0], [0.9, 2.0], [0.8, 2.0]])
    found = temperature_sensitivity(temperatures, values)
    expected = {
        "largest": [9.0, 4.0],
        "slope": [1.0, 1.25],
        "below": [1.0, -5 / 0.3],
        "inside": [2.0, 20.0],
        "above": [-0.5, 0.0],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(value))
    steps = [0.1 * i for i in range(1, 12)]  # with 0.30000000000000004
    assert temperature_sensitivity(steps, torch.tensor(steps), (0.3, 0.7)).inside.item() == pytest.approx(1)
    for wrong in ([0.5, 0.65, 0.7, 0.8, 1.0], [0.2, 0.5, 0.65, 0.9, 1.0], [0.2, 0.8, 0.65, 0.5, 1.0], [0.2] * 5):
        with pytest.raises(ValueError, match="temperatures"):
            temperature_sensitivity(wrong, values)
    with pytest.raises(ValueError, match="values"):
        temperature_sensitivity(temperatures, values[:4])


def test_a_language_model_loses_more_with_fewer_bits(small_gpt) -> None:
    ids = torch.arange(40, 104).view(2, 32)
    with torch.no_grad():
        exact = small_gpt.model(ids).logits
        lost = {}
        for fmt in ("bf16", "int8", "nf4", "fp4"):
            model = apply_ptq(copy.deepcopy(small_gpt.model), fmt)
            assert len(list(format_layers(model))) == 28
            lost[fmt] = temperature_divergence(exact, model(ids).logits, [1.0]).mean().item()
    assert 0 < lost["bf16"] < lost["int8"] < lost["nf4"] < lost["fp4"] < 1


def test_options_reach_the_layers_and_models_are_quantised_once() -> None:
    model = quantize_(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)), WeightFormat("fp4", block_size=32))
    assert [layer.bits_per_weight() for layer in model] == [5, 5]
    with pytest.raises(ValueError, match="quantised already"):
        apply_ptq(model, "nf4")
    assert quantize_(nn.Sequential(nn.Linear(8, 8)), WeightFormat("int8", threshold=3.0))[0].threshold == 3


def test_the_zeros_in_front_of_a_prompt_change_nothing(small_gpt) -> None:
    model, tokenizer = small_gpt
    ids, mask = left_padded([tokenizer(prompt).input_ids for prompt in PROMPTS], torch.device("cpu"))
    drawn = sample(model, ids, mask, 12, 1e-4, 0, torch.Generator().manual_seed(0))
    nll = likelihoods(model, ids, mask, drawn)
    for place, prompt in enumerate(PROMPTS):
        alone, of_one = left_padded([tokenizer(prompt).input_ids], torch.device("cpu"))
        greedy = model.generate(alone, attention_mask=of_one, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(drawn.tokens[place], greedy[0, alone.shape[1] :])
        single = likelihoods(model, alone, of_one, Drawn(drawn.tokens[place : place + 1], drawn.mask[:1], 0))
        torch.testing.assert_close(single[0], nll[place], rtol=1e-4, atol=1e-4)


def test_draws_follow_temperature_and_top_k(small_gpt) -> None:
    model, tokenizer = small_gpt
    ids, mask = left_padded([tokenizer("The ").input_ids] * 2000, torch.device("cpu"))
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, -1]
    drawn = sample(model, ids, mask, 1, 0.7, 0, torch.Generator().manual_seed(0)).tokens[:, 0]
    shares = torch.bincount(drawn, minlength=256) / 2000
    assert (shares - (logits / 0.7).softmax(0)).abs().max() < 0.04
    few = sample(model, ids, mask, 1, 5.0, 3, torch.Generator().manual_seed(0)).tokens[:, 0]
    assert set(few.tolist()) == set(logits.topk(3).indices.tolist())


def test_a_sweep_has_a_row_for_each_generation_and_pairs_its_draws(small_gpt) -> None:
    state = torch.get_rng_state()
    before = copy.deepcopy(small_gpt.model.state_dict())
    sweep = {"temperatures": [0.3, 1.0], "top_ks": [0, 5], "max_new_tokens": 6, "seeds": [1]}
    rows = generation_sweep(*small_gpt, PROMPTS[:2], ["none", "fp4"], **sweep)
    assert len(rows) == 2 * 2 * 2 * 2
    assert {row["format"] for row in rows} == {"none", "fp4"}
    again = generation_sweep(*small_gpt, PROMPTS[:2], ["fp4"], **sweep)
    timed = ("tokens_per_second",)
    kept = [{key: value for key, value in row.items() if key not in timed} for row in rows if row["format"] == "fp4"]
    assert kept == [{key: value for key, value in row.items() if key not in timed} for row in again]
    assert all(row["new_tokens"] <= 6 and row["nll"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["peak_bytes"] > rows[-1]["peak_bytes"]
    cold, hot = ([row["nll"] for row in rows if row["temperature"] == t and row["top_k"] == 0] for t in (0.3, 1.0))
    assert sum(cold) < sum(hot)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in small_gpt.model.state_dict().items())


def test_a_sweep_is_made_in_evaluation_mode(small_gpt) -> None:
    model, seen = copy.deepcopy(small_gpt.model).train(), []
    frozen = model.model.layers[0].eval()
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(module.self_attn.training))
    generation_sweep(model, small_gpt.tokenizer, ["a"], ["none", "bf16"], [1.0], max_new_tokens=2)
    assert set(seen) == {False}
    assert model.training
    assert not frozen.training
    hook.remove()
    with pytest.raises(ValueError, match="prompts"):
        generation_sweep(model, small_gpt.tokenizer, [""], ["none"], [1.0])
    assert model.training


def test_text_ends_where_the_model_ends_it(small_gpt) -> None:
    model, tokenizer = small_gpt
    ids, mask = left_padded([tokenizer("The ").input_ids], torch.device("cpu"))
    first = sample(model, ids, mask, 4, 1e-4, 0, torch.Generator().manual_seed(0)).tokens[0]
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = [int(first[1]), 255]
    drawn = sample(ending, ids, mask, 4, 1e-4, 0, torch.Generator().manual_seed(0))
    place = first.tolist().index(int(first[1]))
    assert drawn.mask[0].tolist() == [i <= place for i in range(4)]


def test_what_cannot_be_swept_is_refused(small_gpt, monkeypatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    for wrong in ({"fmt": "nf3"}, {"block_size": 0}, {"threshold": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WeightFormat(**wrong)
    with pytest.raises(ValueError, match="the weights of 0 are not finite"):
        apply_ptq(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)).apply(broken), "nf4")
    sweep = {"prompts": ["a"], "formats": ["none"], "temperatures": [1.0]}
    for name, wrong in (
        ("formats", ["nf3"]),
        ("formats", []),
        ("prompts", []),
        ("prompts", [""]),
        ("temperatures", [0.0]),
        ("temperatures", [float("nan")]),
        ("top_ks", [-1]),
        ("max_new_tokens", 0),
        ("seeds", []),
    ):
        with pytest.raises(ValueError, match=name):
            generation_sweep(*small_gpt, **(sweep | {name: wrong}))
    with pytest.raises(ValueError, match="logits_q"):
        temperature_divergence(scores(0), scores(1)[:2], [1.0])
    with pytest.raises(ValueError, match="temperatures"):
        temperature_divergence(scores(0), scores(1), [-1.0])
    with pytest.raises(ValueError, match="logits_ref must be numbers, got 'NaN'"):
        temperature_divergence(scores(0) * float("nan"), scores(1), [1.0])
    with pytest.raises(ValueError, match="logits_q must be finite or -inf"):
        temperature_divergence(scores(0), scores(1) / 0, [1.0])


def broken(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.fill_(float("nan"))
