import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairtrial.methods.schedules import WSDLR, WSDSLR, CyclicCosineLR, river_valley_expected_loss

VALLEY = {"h": 1.0, "sigma": 1.0, "c": 0.02, "y0": 1.0}


def rates(schedule, *arguments, lr=1.0, **options):
    """The rate of every step up to the last period end."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = schedule(optimizer, *arguments, **options)
    used = []
    for _ in range(scheduler.period_ends[-1]):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(used, dtype=torch.float64)


def assert_rates(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def test_inverse_decay_is_golden():
    expected = [0.526316, 0.357143, 0.270270, 0.217391, 0.181818, 0.156250, 0.136986, 0.121951, 0.109890, 0.1]
    assert_rates(rates(WSDLR, 100)[90:], expected)


def test_periods_are_golden():
    period = [1.0] * 6 + [0.307692, 0.181818, 0.129032, 0.1]
    assert_rates(rates(WSDSLR, [10, 20], decay_fraction=0.4), period * 2)
    warm = [0.0, 1 / 3, 2 / 3, *period[3:], *period]
    assert_rates(rates(WSDSLR, [10, 20], 3, decay_fraction=0.4), warm)


def test_linear_decay_is_golden_and_stands_one_step_before_that_of_transformers():
    expected = [0.775, 0.55, 0.325, 0.1]
    assert_rates(rates(WSDLR, 12, decay_fraction=0.34, decay="linear"), [1.0] * 8 + expected, atol=1e-12)
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = transformers.get_wsd_schedule(
        optimizer, 0, 4, num_training_steps=12, decay_type="linear", min_lr_ratio=0.1
    )
    assert_rates(torch.tensor([theirs.lr_lambdas[0](step) for step in range(8, 13)]).double(), [1.0, *expected])


@pytest.mark.parametrize("decay", ["inverse", "linear", "cosine", "sqrt"])
def test_decay_shapes_are_their_definitions(decay):
    r, tau = 0.2, torch.arange(1, 6, dtype=torch.float64) / 5
    expected = {
        "inverse": 1 / ((1 - tau) + tau / r),
        "linear": 1 - (1 - r) * tau,
        "cosine": r + (1 - r) * (1 + torch.cos(math.pi * tau)) / 2,
        "sqrt": 1 - (1 - r) * tau.sqrt(),
    }[decay]
    actual = rates(WSDLR, 20, decay_fraction=0.25, min_lr_ratio=r, decay=decay)
    torch.testing.assert_close(actual[15:], expected, atol=1e-12, rtol=0)
    assert torch.equal(actual[:15], torch.ones(15, dtype=torch.float64))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), fraction=st.floats(0.01, 1.0))
def test_every_period_is_the_one_checkpoint_schedule_of_its_length(lengths, fraction):
    ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    whole = rates(WSDSLR, ends, decay_fraction=fraction, decay="sqrt")
    parts = [rates(WSDLR, length, decay_fraction=fraction, decay="sqrt") for length in lengths]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-12, rtol=0)
    torch.testing.assert_close(whole[[end - 1 for end in ends]], torch.full((len(ends),), 0.1).double())


def test_cyclic_cosine_is_cosine_decay_over_whole_periods():
    cyclic = rates(CyclicCosineLR, [6, 20], 0.3)
    assert torch.equal(cyclic, rates(WSDSLR, [6, 20], decay_fraction=1.0, min_lr_ratio=0.3, decay="cosine"))
    assert_rates(cyclic[[2, 5, 12, 19]], [0.65, 0.3, 0.65, 0.3], atol=1e-12)


def test_attributes_say_when_to_branch_and_when_to_save():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = WSDSLR(optimizer, [50, 100, 103], decay_fraction=0.1)
    assert scheduler.period_ends == [50, 100, 103]
    assert scheduler.decay_starts == [45, 95, 102]


def test_a_branch_goes_on_from_before_the_decay():
    short, long = rates(WSDLR, 50), rates(WSDLR, 100)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "initial_lr": 1.0}], lr=1.0)
    scheduler = WSDLR(optimizer, 100, last_epoch=44)
    assert torch.equal(short[:45], long[:45])
    for step in range(45, 100):
        assert optimizer.param_groups[0]["lr"] == long[step]
        optimizer.step()
        scheduler.step()


def test_tensor_rates_stay_tensors():
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=torch.tensor(0.5), capturable=False)
    scheduler = WSDLR(optimizer, 4, decay_fraction=0.5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)


def test_the_step_after_the_last_is_silent_and_further_ones_warn_once(recwarn):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = WSDLR(optimizer, 5)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert not recwarn
    with pytest.warns(UserWarning, match="WSDLR is past its last period end, 5 steps"):
        scheduler.step()
    scheduler.step()
    assert len(recwarn) == 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("total", "schedule", "expected"),
    [
        (2000, "constant", (0.166667, -0.4, -0.233333)),
        (2000, "wsd", (0.013394, -0.370144, -0.356750)),
        (2000, "wsd_s", (0.014025, -0.369971, -0.355947)),
        (2000, "cosine", (0.012834, -0.219910, -0.207076)),
        (2000, "cyclic_cosine", (0.012872, -0.219730, -0.206858)),
        (2000, "linear_to_zero", (0.003524, -0.199900, -0.196376)),
        (500, "wsd", (0.015493, -0.092471, -0.076978)),
        (500, "wsd_s", (0.015493, -0.092471, -0.076978)),
        (500, "cosine", (0.013020, -0.054910, -0.041890)),
        (1000, "wsd", (0.014025, -0.185028, -0.171004)),
        (1000, "wsd_s", (0.015493, -0.184943, -0.169449)),
        (1000, "cosine", (0.012872, -0.109910, -0.097038)),
        (1000, "cyclic_cosine", (0.013020, -0.109820, -0.096800)),
    ],
)
def test_river_valley_is_golden(total, schedule, expected):
    ends = [end for end in (500, 1000, 2000) if end <= total]
    lrs = {
        "constant": lambda: torch.full((total,), 0.5, dtype=torch.float64),
        "wsd": lambda: rates(WSDLR, total, lr=0.5),
        "wsd_s": lambda: rates(WSDSLR, ends, lr=0.5),
        "cosine": lambda: rates(CyclicCosineLR, [total], lr=0.5),
        "cyclic_cosine": lambda: rates(CyclicCosineLR, ends, lr=0.5),
        "linear_to_zero": lambda: 0.5 * (1 - torch.arange(1, total + 1, dtype=torch.float64) / total),
    }[schedule]()
    loss = river_valley_expected_loss(lrs, **VALLEY)
    assert_rates(torch.stack(loss), expected)


def test_river_valley_is_its_recursion_and_its_stationary_limit():
    lrs = torch.rand(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = torch.full((3,), 4.0, dtype=torch.float64)
    for eta in lrs.T:
        spread = (1 - eta * 1.5) ** 2 * spread + eta**2 * 0.3**2
    loss = river_valley_expected_loss(lrs, h=1.5, sigma=0.3, c=-0.1, y0=-2.0)
    torch.testing.assert_close(loss.hill, 0.5 * 1.5 * spread, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.river, -0.01 * lrs.sum(1), rtol=1e-12, atol=0)
    settled = river_valley_expected_loss(torch.full((2000,), 0.4, dtype=torch.float64), h=1.5, sigma=0.3, c=0.0, y0=9.0)
    assert settled.hill.item() == pytest.approx(0.5 * 0.4 * 0.3**2 / (2 - 0.4 * 1.5), rel=1e-12)
    assert river_valley_expected_loss(torch.zeros(0), **VALLEY).total.item() == 0.5


def test_river_valley_agrees_with_simulated_paths():
    generator = torch.Generator().manual_seed(0)
    y = torch.ones(20_000, dtype=torch.float64)
    lrs = rates(WSDLR, 500, lr=0.5)
    for eta in lrs:
        y = (1 - eta) * y - eta * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    losses = y.square() / 2
    expected = river_valley_expected_loss(lrs, **VALLEY).hill
    assert expected.item() == pytest.approx(0.015493, abs=1e-6)
    error = losses.std() / math.sqrt(len(losses))
    assert error.item() == pytest.approx(1.6e-4, rel=0.1)
    assert (losses.mean() - expected).abs() < 4 * error


def test_river_valley_is_differentiable_in_the_rates():
    lrs = torch.rand(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda lrs: river_valley_expected_loss(lrs, **VALLEY), (lrs,))


@pytest.mark.parametrize(
    ("schedule", "arguments", "name"),
    [
        (WSDSLR, {"checkpoints": []}, "checkpoints"),
        (WSDSLR, {"checkpoints": [10, 10]}, "checkpoints"),
        (WSDSLR, {"checkpoints": [0, 10]}, "checkpoints"),
        (WSDSLR, {"checkpoints": [10], "decay_fraction": 0.0}, "decay_fraction"),
        (WSDSLR, {"checkpoints": [10], "decay_fraction": 1.1}, "decay_fraction"),
        (WSDSLR, {"checkpoints": [10], "decay_fraction": math.nan}, "decay_fraction"),
        (WSDSLR, {"checkpoints": [10], "min_lr_ratio": 0.0}, "min_lr_ratio"),
        (WSDSLR, {"checkpoints": [10], "min_lr_ratio": math.nan}, "min_lr_ratio"),
        (WSDSLR, {"checkpoints": [10, 90], "warmup_steps": 10}, "warmup_steps"),
        (WSDSLR, {"checkpoints": [10], "warmup_steps": -1}, "warmup_steps"),
        (WSDSLR, {"checkpoints": [10], "decay": "exponential"}, "decay"),
        (WSDLR, {"total_steps": 0}, "total_steps"),
        (CyclicCosineLR, {"period_ends": [5, 3]}, "period_ends"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(schedule, arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), **arguments)


@pytest.mark.parametrize("wrong", [{"h": 0.0}, {"sigma": -1.0}, {"c": math.inf}, {"y0": math.nan}])
def test_impossible_valleys_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        river_valley_expected_loss(torch.ones(3), **(VALLEY | wrong))
