import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from fairtrial.methods.optimizers import QZO, MeZO, direction_seed, spsa_projected_grad
from fairtrial.methods.optimizers.mezo import directions, losses_on_both_sides_

F64 = torch.float64
SHAPES = ((6,), (5, 3), (2, 7), (2, 3, 2, 2), ())


def some_params(seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in SHAPES]


def bowl(params):
    """A quadratic loss of the parameters."""
    return lambda: sum((0.5 + i) * (p - 1).square().sum() for i, p in enumerate(params))


def mezo(params, **options):
    return MeZO(params, **{"lr": 1e-3, "eps": 1e-3, **options})


def qzo(params, **options):
    return QZO(params, **{"lr": 1e-3, "clip": 5.0, "floor": 1e-3, **options})


each = pytest.mark.parametrize("make", [mezo, qzo])


def run(make, params, steps, **options):
    optimizer = make(params, **options)
    for _ in range(steps):
        optimizer.step(bowl(params))
    return optimizer


def test_a_step_is_the_formula():
    params, expected = some_params(), some_params()
    optimizer = mezo(params, weight_decay=0.1, seed=3)
    for number in range(5):
        z = [z for _, z in directions(expected, direction_seed(3, number))]
        losses = [bowl([p + side * 1e-3 * v for p, v in zip(expected, z, strict=True)])() for side in (1, -1)]
        d = float(losses[0] - losses[1]) / 2e-3
        expected = [p - 1e-3 * (d * v + 0.1 * p) for p, v in zip(expected, z, strict=True)]
        value = optimizer.step(bowl(params))
        assert value == pytest.approx(float(losses[0] + losses[1]) / 2, rel=1e-12)
        assert optimizer.last_directional_derivative == pytest.approx(d, rel=1e-9)
    torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-12)


def test_the_slope_of_a_quadratic_loss_is_exact_and_its_mean_times_z_is_the_gradient():
    params = [torch.linspace(-1, 1, 5, dtype=F64)]
    A = torch.diag(torch.linspace(0.5, 2, 5, dtype=F64)) + 0.1
    gradient, total, spread, draws = A @ params[0], torch.zeros(5, dtype=F64), 0.0, 4000
    for number in range(draws):
        d = spsa_projected_grad(params, lambda: 0.5 * params[0] @ A @ params[0], number, 0.5)
        (z,) = (z for _, z in directions(params, number))
        if number < 50:
            assert d == pytest.approx(float(z @ gradient), rel=1e-9)
        total += d * z
        spread += float((d * z - gradient).square().sum()) / draws
    assert (total / draws - gradient).norm() < 0.05 * gradient.norm()
    assert spread == pytest.approx(6 * float(gradient.square().sum()), rel=0.06)  # (P + 1) ‖∇L‖²


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_parameters_come_back(dtype):
    params, before = some_params(dtype=dtype), some_params(dtype=dtype)
    spsa_projected_grad(params, bowl(params), 1, exact_restore=True)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    spsa_projected_grad(params, bowl(params), 1)
    for p, q in zip(params, before, strict=True):
        assert (p - q).abs().max() <= 16 * torch.finfo(dtype).eps


def test_parameters_come_back_when_the_loss_raises():
    def raises_on(call):
        calls = []

        def loss():
            calls.append(1)
            if len(calls) == call:
                raise RuntimeError("no loss today")
            return 0.0

        return loss

    for call in (1, 2):
        params, before = some_params(), some_params()
        with pytest.raises(RuntimeError, match="no loss today"):
            losses_on_both_sides_(params, raises_on(call), 0, 1e-3)
        torch.testing.assert_close(params, before, rtol=0, atol=1e-15)
        for exact in (False, True):
            with pytest.raises(RuntimeError, match="no loss today"):
                spsa_projected_grad(params, raises_on(call), 0, exact_restore=exact)
            torch.testing.assert_close(params, before, rtol=0, atol=1e-15)


@each
def test_equal_seeds_give_equal_runs_and_others_do_not(make):
    ends = []
    for seed in (0, 0, 1):
        params = some_params()
        run(make, params, 5, seed=seed)
        ends.append(torch.cat([p.flatten() for p in params]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_smooth_loss_is_descended():
    params = some_params()
    before = float(bowl(params)())
    optimizer = mezo(params, lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1500)
    for _ in range(1500):
        optimizer.step(bowl(params))
        schedule.step()
    assert float(bowl(params)()) < 1e-2 * before
    assert optimizer.param_groups[0]["lr"] == 0


@each
def test_a_rate_of_zero_restores_and_gradients_are_left_alone(make):
    params = [nn.Parameter(p.abs() + 0.1) for p in some_params(dtype=torch.float32)]
    params[0].grad = torch.full_like(params[0], 7.0)
    before, state = copy.deepcopy(params), torch.get_rng_state()
    run(make, params, 1, lr=0.0)
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert (params[0].grad == 7).all()
    assert all(p.grad is None for p in params[1:])
    assert torch.equal(torch.get_rng_state(), state)


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(make, value):
    params = [p.abs() + 0.1 for p in some_params()]
    before = copy.deepcopy(params)
    optimizer = make(params, lr=1.0, weight_decay=0.5)
    optimizer.step(lambda: value)
    torch.testing.assert_close(params, before, rtol=0, atol=1e-15)
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)
    optimizer.step(bowl(params))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)
    assert not torch.equal(params[0], before[0])


@each
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(make, dtype):
    whole = some_params(dtype=dtype)
    end = run(make, whole, 6, seed=5)
    params = some_params(dtype=dtype)
    for number in range(6):
        optimizer = make(params)
        if number:
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        else:
            optimizer.seed = 5
        optimizer.step(bowl(params))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
    assert all(torch.equal(p, q) and p.dtype == dtype for p, q in zip(params, whole, strict=True))
    assert optimizer.state_dict() == end.state_dict()


CONTINUED = """
import sys, torch
from fairtrial.methods.optimizers import MeZO
params, state = torch.load(sys.argv[1], weights_only=True)
optimizer = MeZO(params, lr=0.5)
optimizer.load_state_dict(state)
for _ in range(20):
    optimizer.step(lambda: sum((0.5 + i) * (p - 1).square().sum() for i, p in enumerate(params)))
torch.save(params, sys.argv[1])
"""


def test_a_run_goes_on_in_a_fresh_process(tmp_path):
    params = some_params()
    optimizer = run(mezo, params, 7, seed=2)
    torch.save((params, optimizer.state_dict()), tmp_path / "run")
    for _ in range(20):
        optimizer.step(bowl(params))
    subprocess.run([sys.executable, "-c", CONTINUED, str(tmp_path / "run")], check=True, timeout=60)
    continued = torch.load(tmp_path / "run", weights_only=True)
    assert all(torch.equal(p, q) for p, q in zip(params, continued, strict=True))


@each
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_the_same_way(make, duplicate):
    params = some_params()
    optimizer = run(make, params, 3)
    other_params, other = duplicate((params, optimizer))
    for chosen, own in ((optimizer, params), (other, other_params)):
        for _ in range(3):
            chosen.step(bowl(own))
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))
    assert repr(other) == repr(optimizer)


@each
def test_a_wrong_state_is_refused_before_anything_changes(make):
    params = some_params()
    optimizer = run(make, params, 2)
    before = copy.deepcopy(optimizer.state_dict())
    leaves = [nn.Parameter(p.clone()) for p in params]
    adam = torch.optim.Adam(leaves)
    bowl(leaves)().backward()
    adam.step()
    state = optimizer.state_dict()
    wrong = [
        adam.state_dict(),
        {**adam.state_dict(), **{name: state[name] for name in state.keys() - {"state", "param_groups"}}},
        {**state, "param_groups": [{**state["param_groups"][0], "params": [0]}]},
        {**state, "state": adam.state_dict()["state"]},
        {name: value for name, value in state.items() if name != "steps"},
    ]
    for state in wrong:
        with pytest.raises(ValueError):
            optimizer.load_state_dict(state)
        assert optimizer.state_dict() == before


@each
def test_groups_have_rates_and_decays_of_their_own_and_one_eps(make):
    params = [p.abs() + 0.1 for p in some_params()]
    before = copy.deepcopy(params)
    optimizer = make([{"params": params[:2], "lr": 0.0, "weight_decay": 0.5}, {"params": params[2:]}])
    optimizer.step(bowl(params))
    for i, (p, q) in enumerate(zip(params, before, strict=True)):
        assert torch.allclose(p, q, rtol=0, atol=1e-14) == (i < 2)
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [torch.ones(2)], "eps": 0.1})
    assert len(optimizer.param_groups) == 2


@each
def test_its_step_can_be_compiled(make):
    ends = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        params = some_params()
        step = wrap(make(params).step)
        for _ in range(3):
            step(bowl(params))
        ends.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@each
def test_misuse_is_refused_with_the_argument_named(make, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks of types would come first
    bad = {"lr": (-0.1, math.nan), "eps": (0.0, -1e-3, math.nan, math.inf), "weight_decay": (-0.1,), "seed": (-1, 0.5)}
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match="numbers" if name == "seed" else name):
                make([torch.ones(2)], **{name: value})
    for wrong in (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="params"):
            make([wrong])
    with pytest.raises(ValueError, match="empty"):
        make([])
    with pytest.raises(ValueError, match="closure"):
        make([torch.ones(2)]).step()
    with pytest.raises(ValueError, match="eps"):
        spsa_projected_grad([torch.ones(2)], lambda: 0.0, 0, 0.0)
