"""Rounding with error feedback: its own definition, its limits, and what it is for."""

import copy
import math

import pytest
import torch
from torch import nn

from fairtrial.methods.quantization import GPTQ, RoundToNearest, quantize_
from fairtrial.methods.quantization.gptq import error_feedback, gptq_round, round_half_up

F64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def correlated(n, seed=1):
    x = drawn(4 * n, n, seed=seed) @ drawn(n, n, seed=seed + 1)
    return x.t() @ x / len(x)


def one_by_one(weight, scale, offset, hessian, lowest, highest):
    """Optimal brain surgery on fewer and fewer columns, with the inverse of what is left of H made anew each time."""
    w, numbers = weight.clone(), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        numbers[:, i] = round_half_up((w[:, i] - offset[:, 0]) / scale[:, 0]).clamp(lowest, highest)
        error = w[:, i] - (numbers[:, i] * scale[:, 0] + offset[:, 0])
        w[:, i:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return numbers


@pytest.mark.parametrize("width", [6, 150])  # in one block of columns, and in two
def test_each_step_is_optimal_brain_surgery_on_the_columns_to_come(width):
    hessian, weight = correlated(width), drawn(5, width)
    scale, offset = torch.full((5, 1), 0.7, dtype=F64), torch.full((5, 1), 0.1, dtype=F64)
    found = gptq_round(weight, scale, offset, error_feedback(hessian, act_order=False), -4, 3)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=F64)
    torch.testing.assert_close(found, one_by_one(weight, scale, offset, damped, -4, 3), rtol=0, atol=0)


def test_the_order_of_the_columns_is_that_of_their_inputs():
    hessian, weight = correlated(12), drawn(5, 12)
    order = hessian.diagonal().argsort(descending=True)
    scale, offset = torch.full((5, 1), 0.7, dtype=F64), torch.zeros(5, 1, dtype=F64)
    feedback = error_feedback(hessian)
    assert feedback.order.tolist() == order.tolist()
    by_hand = gptq_round(
        weight[:, order], scale, offset, error_feedback(hessian[order][:, order], act_order=False), -4, 3
    )
    torch.testing.assert_close(gptq_round(weight, scale, offset, feedback, -4, 3)[:, order], by_hand)


def test_with_uncorrelated_inputs_nothing_is_passed_on():
    weight, scale, offset = drawn(5, 12), drawn(5, 3).abs() + 0.1, drawn(5, 3)
    nearest = round_half_up((weight.view(5, 3, 4) - offset[..., None]) / scale[..., None]).clamp(-2, 1).flatten(1)
    for hessian in (torch.diag(drawn(12).square()), torch.zeros(12, 12, dtype=F64)):
        torch.testing.assert_close(gptq_round(weight, scale, offset, error_feedback(hessian), -2, 1), nearest)


def test_halves_are_rounded_up():
    assert round_half_up(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [-1, 0, 1, 2, 3]


def test_damping_grows_until_it_suffices():
    semidefinite = torch.ones(8, 8, dtype=F64)
    slightly_negative = semidefinite - 0.05 * torch.eye(8, dtype=F64)
    for hessian in (semidefinite, slightly_negative):
        assert error_feedback(hessian).factor.isfinite().all()
    for wrong in (-semidefinite, torch.full((8, 8), math.nan, dtype=F64)):
        with pytest.raises(ValueError, match="hessian must be positive semidefinite"):
            error_feedback(wrong)


def layer():
    made = nn.Linear(64, 24)
    with torch.no_grad():
        made.weight.copy_(drawn(24, 64))
        made.bias.copy_(drawn(24))
    return nn.Sequential(made)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_the_output_suffers_less_than_by_rounding_to_nearest(group_size):
    x = (drawn(300, 64, seed=3) @ drawn(64, 64, seed=4)).float()
    exact = layer()(x)
    errors = [
        (quantize_(layer(), config(3, group_size), [x])(x) - exact).square().mean() for config in (GPTQ, RoundToNearest)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_a_language_model_loses_less(small_gpt):
    ids = torch.tensor(list(b"The compound statements of a program contain other statements; they affect them." * 3))[
        None
    ]
    losses = []
    for config in (GPTQ(2, 64), RoundToNearest(2, 64)):
        model = quantize_(copy.deepcopy(small_gpt.model), config, [ids])
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    "wrong", [{"bits": 0}, {"bits": 9}, {"group_size": 0}, {"percdamp": 0.0}, {"percdamp": math.nan}]
)
def test_misuse_is_refused_with_the_argument_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTQ(**wrong)


def test_a_layer_that_groups_do_not_divide_is_named():
    with pytest.raises(ValueError, match=r"0: .*group_size.*divisor of the layer's input width 64"):
        quantize_(layer(), GPTQ(group_size=48), [torch.ones(2, 64)])
