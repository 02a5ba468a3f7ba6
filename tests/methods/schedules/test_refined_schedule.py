import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtrial.methods.schedules import (
    GradNormRecorder,
    LinearDecayLR,
    RefinedLR,
    last_iterate_bound,
    optimize_schedule,
    refined_schedule,
    smooth_norms,
)

norms_of_a_run = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40)


def rates(make, lr=1.0, steps=None):
    """The rate of each of so many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = make(optimizer)
    used = []
    for _ in range(steps or scheduler.total_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_equal_weights_are_linear_decay():
    raw = refined_schedule([1.0] * 5, None, weights=[1.0] * 5, normalize=False)
    np.testing.assert_allclose(raw, [0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)
    np.testing.assert_allclose(refined_schedule([1.0] * 5), [1, 0.75, 0.5, 0.25, 0], atol=1e-15)
    np.testing.assert_allclose(rates(lambda optimizer: LinearDecayLR(optimizer, 5)), raw, atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "normalize", "expected"),
    [
        ("sgd", False, (0.061404, 0.228070, 0.631579, 0.350877, 0.070175, 0)),
        ("sgd", True, (0.097222, 0.361111, 1, 0.555556, 0.111111, 0)),
        ("adam", True, (0.4, 0.7, 1, 0.6, 0.2, 0)),
    ],
)
def test_refined_schedules_are_golden(kind, normalize, expected):
    found = refined_schedule([4, 2, 1, 1, 1, 2], kind, smoothing=0.0, normalize=normalize)
    np.testing.assert_allclose(found, expected, atol=5e-7)


def test_the_authors_function_gives_a_multiple():
    found = refined_schedule([4, 2, 1, 1, 1, 2], smoothing=0.0)
    np.testing.assert_allclose(found, np.array([0.875, 3.25, 9, 5, 1, 0]) / 9, rtol=1e-14)


def test_the_running_median_is_golden():
    np.testing.assert_array_equal(smooth_norms([5, 4, 3, 9, 2, 2, 1, 1, 1, 2], 0.3), [5, 4, 4, 3, 2, 2, 1, 1, 1, 1])


@pytest.mark.parametrize(("steps", "fraction", "width"), [(100, 0.29, 29), (30, 0.1, 3), (19, 0.1, 1), (6, 1.0, 7)])
def test_the_window_is_as_wide_as_it_says(steps, fraction, width):
    spike = np.ones(steps)
    spike[: width // 2] = 2.0  # with the first of them repeated before the start, most of the first windows
    assert (smooth_norms(spike, fraction) == spike).all()
    alone = np.ones(steps)
    alone[steps // 2] = 2.0
    assert (smooth_norms(alone, fraction) == alone).all() == (width == 1)


@pytest.mark.parametrize(("kind", "peak"), [("sgd", 58), ("adam", 40)])
def test_shrinking_gradients_give_a_warm_up(kind, peak):
    t = np.arange(1, 101)
    found = refined_schedule(t**-0.5, kind, smoothing=0.0)
    assert t[found.argmax()] == peak
    assert (np.diff(found[:peak]) > 0).all()
    assert (np.diff(found[peak - 1 :]) < 0).all()
    assert found[-1] == 0


@settings(deadline=None)
@given(norms=norms_of_a_run, kind=st.sampled_from(["sgd", "adam"]), scale=st.floats(1e-100, 1e100))
def test_scale_does_not_matter_and_rates_are_at_least_zero(norms, kind, scale):
    found = refined_schedule(norms, kind)
    assert found.max() == 1
    assert found[-1] == 0
    assert (found >= 0).all()
    np.testing.assert_allclose(refined_schedule(np.array(norms) * scale, kind), found, rtol=1e-9, atol=1e-15)


@settings(deadline=None)
@given(steps=st.integers(2, 200))
def test_rates_without_normalisation_add_up(steps):
    raw = refined_schedule(np.ones(steps), normalize=False)
    assert raw.sum() == pytest.approx((steps - 1) / 2)


def test_linear_decay_with_warm_up():
    found = rates(lambda optimizer: LinearDecayLR(optimizer, 10, 4), lr=2.0)
    np.testing.assert_allclose(found, [0.5, 1, 1.5, 2, 2 * 5 / 6, 2 * 4 / 6, 1, 2 * 2 / 6, 2 / 6, 0], atol=1e-12)


def test_linear_decay_warns_once_past_its_end(recwarn):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = LinearDecayLR(optimizer, 2)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert not recwarn
    with pytest.warns(UserWarning, match="past its end, 2 steps"):
        scheduler.step()
    scheduler.step()
    assert not recwarn
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_refined_schedule_is_followed_and_ends_with_its_run():
    schedule = refined_schedule([4, 2, 1, 1, 1, 2], smoothing=0.0)
    groups = [{"params": [torch.zeros(1)], "lr": 0.5}, {"params": [torch.zeros(1)], "lr": torch.tensor(0.2)}]
    optimizer = torch.optim.Adam(groups)
    scheduler = RefinedLR(optimizer, schedule)
    for factor in schedule:
        assert optimizer.param_groups[0]["lr"] == 0.5 * factor
        assert optimizer.param_groups[1]["lr"].item() == pytest.approx(0.2 * factor)
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.0, 0.0]
    with pytest.raises(ValueError, match="6 factors"):
        scheduler.step()


def test_a_refined_schedule_resumes_from_a_file_and_from_a_step_number():
    schedule = refined_schedule(np.linspace(3, 1, 12))
    whole = rates(lambda optimizer: RefinedLR(optimizer, schedule), 0.3, 12)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = RefinedLR(optimizer, schedule)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    fresh = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    resumed = RefinedLR(fresh, np.ones(3))
    resumed.load_state_dict(state)
    fresh.load_state_dict(saved)
    later = torch.optim.SGD([{"params": [torch.zeros(1)], "initial_lr": 0.3}], lr=0.3)
    stepped = RefinedLR(later, schedule, last_epoch=4)
    for step in range(5, 12):
        assert fresh.param_groups[0]["lr"] == later.param_groups[0]["lr"] == whole[step]
        for end, scheduled in ((fresh, resumed), (later, stepped)):
            end.step()
            scheduled.step()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_recorded_norms_are_those_of_the_whole_gradient(p, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (3,), (40, 50), (2, 3, 4, 4), ()
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    recorder = GradNormRecorder([*params, torch.nn.Parameter(torch.zeros(7))], p)
    assert recorder.norms.shape == (0,)
    expected = []
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        whole = torch.cat([param.grad.double().flatten() for param in params])
        recorder.record()
        expected.append(whole.norm(p).item())
        params[0].grad.zero_()  # what was recorded stays
    np.testing.assert_allclose(recorder.norms, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5)


def test_the_optimised_schedule_for_equal_norms_is_golden():
    found = optimize_schedule([1.0] * 10)
    assert found.bound == pytest.approx(0.578013, abs=1e-5)
    expected = [0.7831, 0.7185, 0.6543, 0.5908, 0.5279, 0.4660, 0.4050, 0.3452, 0.2871, 0]
    np.testing.assert_allclose(found.rates * math.sqrt(10), expected, atol=1e-3)
    assert found.unused * math.sqrt(10) == pytest.approx(0.6931, abs=1e-3)
    constant = torch.full((10,), 10**-0.5, dtype=torch.float64)
    assert last_iterate_bound(constant, torch.ones(10, dtype=torch.float64)).item() == pytest.approx(0.763527, abs=1e-6)


def test_the_optimised_schedule_for_other_norms_is_golden():
    found = optimize_schedule([4, 2, 1, 1, 1, 2])
    assert found.bound == pytest.approx(1.090338, abs=1e-5)
    np.testing.assert_allclose(found.rates, [0.03285, 0.11626, 0.30292, 0.21551, 0.13798, 0], atol=1e-3)
    assert found.unused == pytest.approx(0.11163, abs=1e-3)


@pytest.mark.parametrize(("scale", "D"), [(1e-3, 1.0), (30.0, 1e3)])
def test_the_optimised_schedule_scales_with_distance_and_norms(scale, D):
    norms = np.array([3.0, 1.0, 2.0, 1.0])
    plain, scaled = optimize_schedule(norms), optimize_schedule(norms * scale, D)
    np.testing.assert_allclose(scaled.rates, plain.rates * D / scale, rtol=1e-3)
    assert scaled.bound == pytest.approx(plain.bound * D * scale, rel=1e-6)


def test_the_bound_is_differentiable():
    generator = torch.Generator().manual_seed(0)
    eta, norms = (torch.rand(6, generator=generator, dtype=torch.float64, requires_grad=True) + 0.1 for _ in range(2))
    assert torch.autograd.gradcheck(last_iterate_bound, (eta, norms))


def test_the_last_iterate_keeps_its_bound_with_linear_decay_but_not_at_a_constant_rate():
    T = 100
    ends = {}
    for name, factors in (("linear", 1 - np.arange(1, T + 1) / T), ("constant", np.ones(T))):
        x = np.arange(2001) / 2000
        for factor in factors:
            x = x - factor / math.sqrt(T) * np.sign(x)
        ends[name] = np.abs(x).max()
    assert ends["linear"] == pytest.approx(0.001, abs=5e-4)
    assert ends["linear"] < 1 / math.sqrt(T)
    assert ends["constant"] == pytest.approx(0.1, abs=5e-4)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"grad_norms": []}, "grad_norms"),
        ({"grad_norms": [1.0]}, "grad_norms"),
        ({"grad_norms": [[1.0, 2.0]]}, "grad_norms"),
        ({"grad_norms": [1.0, 0.0]}, "grad_norms"),
        ({"grad_norms": [1.0, -1.0]}, "grad_norms"),
        ({"grad_norms": [1.0, math.nan]}, "grad_norms"),
        ({"grad_norms": [1.0, math.inf]}, "grad_norms"),
        ({"grad_norms": [1, 2], "smoothing": 1.5}, "smoothing"),
        ({"grad_norms": [1, 2], "smoothing": math.nan}, "smoothing"),
        ({"grad_norms": [1, 2], "kind": None}, "weights"),
        ({"grad_norms": [1, 2], "weights": [1, 2]}, "weights"),
        ({"grad_norms": [1, 2], "kind": None, "weights": [1, 2, 3]}, "weights"),
        ({"grad_norms": [1, 2], "kind": None, "weights": [1, 0]}, "weights"),
    ],
)
def test_misuse_of_norms_is_refused_with_the_argument_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        refined_schedule(**arguments)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda optimizer: RefinedLR(optimizer, []), "schedule"),
        (lambda optimizer: RefinedLR(optimizer, [1.0, -0.1]), "schedule"),
        (lambda optimizer: RefinedLR(optimizer, [1.0, math.nan]), "schedule"),
        (lambda optimizer: LinearDecayLR(optimizer, 0), "total_steps"),
        (lambda optimizer: LinearDecayLR(optimizer, 5, 5), "warmup_steps"),
        (lambda optimizer: LinearDecayLR(optimizer, 5, -1), "warmup_steps"),
        (lambda optimizer: GradNormRecorder([]), "params"),
        (lambda optimizer: GradNormRecorder([torch.zeros(1)]).record(), "params"),
        (lambda optimizer: optimize_schedule([1.0, 2.0], 0.0), "D"),
        (lambda optimizer: optimize_schedule([1.0, math.nan]), "grad_norms"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call(torch.optim.SGD([torch.zeros(1)], lr=1.0))
