"""What every registered optimizer must do. A new one is enrolled by its `@method(slot="optimizer")` alone.

Run as a program it continues, in a process of its own, the runs that a test has saved.
"""

import copy
import inspect
import io
import math
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.registry import index

# those of other packages are as their makers want them
OPTIMIZERS = [entry for entry in index() if entry.slot == "optimizer" and not entry.module.endswith(".packages")]
BATCHES = 4
# optimizers that may stop where no minimum is, and why
STOP_ELSEWHERE = {"OrthoGrad": "it stops where each gradient lies along its tensor"}
# optimizers whose rate rests on the gradients of all tensors, and what becomes of it
ONE_RATE = {"Prodigy": "its estimate is held from then on"}
# optimizers that learn from more than gradients, and from what
BEYOND_GRADIENTS = {"KFAC": "from backward passes, and a layer's weight and bias take their step together"}
SAVED_AT, LONG_RUN = 185, 215  # steps; in between comes what repeats every 200

each_optimizer = pytest.mark.parametrize("entry", OPTIMIZERS, ids=[entry.name for entry in OPTIMIZERS])


class Everything(nn.Module):
    """A small classifier with parameters of zero, one, two and four dimensions, and an empty one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.hidden = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
        self.gain = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x, token):
        h = self.norm(self.conv(x)).flatten(1) + self.embed(token)
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        return self.head(self.gain * h) + self.empty.sum()


def new_model(seed=0, dtype=torch.float32):
    model = Everything()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model.to(dtype)


def loss_of(model, number):
    generator = torch.Generator().manual_seed(1000 + number % BATCHES)
    x = torch.randn(12, 1, 4, 4, generator=generator).to(model.head.weight.dtype)
    token, y = torch.randint(5, (2, 12), generator=generator)
    return F.cross_entropy(model(x, token).float(), y)


class Middle:
    """Suggests the middle of every range, as a trial of a tuning run would suggest something."""

    def suggest_float(self, name, low, high, *, log=False):
        return math.sqrt(low * high) if log else (low + high) / 2

    def suggest_int(self, name, low, high, *, log=False):
        return int(self.suggest_float(name, low, high, log=log))

    def suggest_categorical(self, name, options):
        return options[0]


def build(entry, model, **options):
    """The optimizer as a task would make it, in the middle of its search space, of which lr has to be a part."""
    method = entry.load()
    setting = SimpleNamespace(model=model, generator=torch.Generator().manual_seed(7), total_steps=100)
    searched = {name: space.suggest(Middle(), name) for name, space in method.search.items()}
    return method.factory(**{"params": model.parameters(), **method.bind(setting), **searched, **options})


def groups_of(entry, model):
    """Its parameter groups, to be changed and handed to `build` as `params`."""
    return [{**group, "params": list(group["params"])} for group in build(entry, model).param_groups]


def run(model, optimizer, steps, *, start=0, step=None):
    for number in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        (step or optimizer.step)()
    return model


def takes(entry, name):
    return name in inspect.signature(entry.load().factory).parameters


def assert_equal(a, b):
    """Bit for bit: models, or anything that state dicts are made of."""
    if isinstance(a, nn.Module):
        a, b = a.state_dict(), b.state_dict()
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.fixture
def unchecked(monkeypatch):
    """Shapes and types are left to the optimizer itself: the annotations' checks would come before its own."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@each_optimizer
def test_training_lowers_the_loss_and_leaves_leaves(entry):
    model = new_model()
    optimizer = build(entry, model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = sum(loss_of(model, i).item() for i in range(BATCHES))
    run(model, optimizer, 150)
    assert sum(loss_of(model, i).item() for i in range(BATCHES)) < 0.8 * before
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


@each_optimizer
def test_a_convex_quadratic_is_solved_within_1000_steps(entry):
    if entry.name in STOP_ELSEWHERE:
        pytest.skip(STOP_ELSEWHERE[entry.name])
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    generator = torch.Generator().manual_seed(0)
    goals = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    curvatures = [torch.rand(p.shape, generator=generator) + 0.1 for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))

    def loss():
        return sum((c * (p - g) ** 2).sum() for p, g, c in zip(model.parameters(), goals, curvatures, strict=True))

    optimizer = build(entry, model, lr=entry.load().search["lr"].high / 2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1000)
    before = loss().item()
    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    assert loss().item() < 1e-3 * before


@each_optimizer
def test_rosenbrocks_valley_is_gone_through_within_1000_steps(entry):
    """At half the highest rate that is searched or, where steps are as long as gradients, further down."""
    if entry.name in STOP_ELSEWHERE:
        pytest.skip(STOP_ELSEWHERE[entry.name])

    def loss(model):
        x, y = torch.cat([p.flatten() for p in model.parameters()]).view(2, -1)
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).sum()

    def share_left(rate):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1, generator=generator)
        optimizer = build(entry, model, lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1000)
        before = loss(model).item()
        for _ in range(1000):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            schedule.step()
        return loss(model).item() / before

    rates = entry.load().search["lr"]
    middle = math.sqrt(rates.low * rates.high)
    assert any(share_left(rate) < 0.02 for rate in (rates.high / 2, middle, rates.low))


@each_optimizer
def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(entry):
    models = new_model(), new_model()
    optimizers = [build(entry, model) for model in models]
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizers[0].zero_grad()
        loss = loss_of(models[0], len(calls))
        loss.backward()
        calls.append(loss)
        return loss

    for number in range(3):
        assert optimizers[0].step(closure) is calls[number]
    run(models[1], optimizers[1], 3)
    assert_equal(*models)
    assert optimizers[1].step() is None


@each_optimizer
def test_one_by_one_and_all_at_once_give_the_same(entry):
    if not takes(entry, "foreach"):
        pytest.skip("has no foreach")
    ends = [run(model, build(entry, model, foreach=on), 6) for on, model in ((True, new_model()), (False, new_model()))]
    assert_equal(*ends)


@each_optimizer
def test_maximize_follows_the_negative_gradient(entry):
    if not takes(entry, "maximize"):
        pytest.skip("has no maximize")
    up, down = new_model(), new_model()
    optimizers = build(entry, up, maximize=True), build(entry, down)
    for number in range(4):
        for sign, model, optimizer in ((-1, up, optimizers[0]), (1, down, optimizers[1])):
            optimizer.zero_grad()
            (sign * loss_of(model, number)).backward()
            optimizer.step()
    assert_equal(up, down)


@each_optimizer
def test_parameters_without_gradient_stay_and_gradients_are_not_changed(entry):
    model = new_model()
    model.hidden[0].requires_grad_(False)
    optimizer = build(entry, model, params=groups_of(entry, model), weight_decay=0.1)
    before = copy.deepcopy(model)
    loss_of(model, 0).backward()
    model.conv.weight.grad = model.gain.grad = None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) == (name not in gradients or p.numel() == 0)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    optimizer.zero_grad()
    optimizer.step()
    run(model, optimizer, 2)


@each_optimizer
def test_groups_have_rates_and_decays_of_their_own(entry):
    model, reference = new_model(), new_model()
    still, moving = groups_of(entry, model)[0], groups_of(entry, model)[1:]
    still["params"], rest = still["params"][:3], {**still, "params": still["params"][3:]}
    optimizer = build(entry, model, params=[{**still, "lr": 0.0, "weight_decay": 0.5}, rest, *moving])
    run(model, optimizer, 3)
    names = {id(p): name for name, p in model.named_parameters()}
    frozen = {names[id(p)] for p in still["params"]}
    for (name, p), start in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, start) == (name in frozen or p.numel() == 0)


@each_optimizer
def test_a_group_added_later_starts_as_a_new_one(entry):
    model = new_model()
    *early, late = groups_of(entry, model)
    late["params"], kept = late["params"][1:], {**late, "params": late["params"][:1]}
    optimizer = build(entry, model, params=[*early, kept])
    run(model, optimizer, 3)
    before = [p.detach().clone() for p in late["params"]]
    optimizer.add_param_group({**late, "lr": 0.02})
    run(model, optimizer, 3, start=3)
    assert all(not torch.equal(p, old) for p, old in zip(late["params"], before, strict=True) if p.numel())
    assert optimizer.param_groups[-1]["lr"] == 0.02


@each_optimizer
def test_a_rate_of_zero_changes_nothing(entry):
    model = new_model()
    optimizer = build(entry, model, lr=0.0, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    run(model, optimizer, 3)
    assert_equal([p.detach() for p in model.parameters()], before)


@each_optimizer
def test_weight_decay_shrinks_weights_without_gradient(entry):
    model = new_model()
    first = {name: 0.1 for name in ("d0", "reps_rel") if takes(entry, name)}  # the default of 1e-6 is lost in rounding
    optimizer = build(entry, model, lr=0.1, weight_decay=0.5, **first)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.numel() == 0 or p.detach().abs().sum() < old.abs().sum()


@each_optimizer
def test_a_rate_may_be_a_tensor_and_follows_a_schedule(entry):
    models = new_model(), new_model()
    for model, rate in zip(models, (0.01, torch.tensor(0.01, dtype=torch.float64)), strict=True):
        optimizer = build(entry, model, lr=rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for number in range(3):
            run(model, optimizer, 1, start=number)
            schedule.step()
    assert_equal(*models)


@each_optimizer
def test_sparse_and_complex_are_refused_before_anything_changes(entry):
    model = new_model()
    optimizer = build(entry, model)
    run(model, optimizer, 2)
    loss_of(model, 2).backward()
    before = snapshot(model, optimizer)
    model.head.weight.grad = torch.ones_like(model.head.weight).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_equal(snapshot(model, optimizer), before)
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    group = {**groups_of(entry, model)[0], "params": [number]}
    with pytest.raises(RuntimeError, match="complex"):
        build(entry, model, params=[group, *groups_of(entry, model)]).step()
    assert torch.equal(number, torch.ones_like(number))


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(entry, dtype):
    whole = new_model(dtype=dtype)
    run(whole, build(entry, whole), 12)
    model = new_model(dtype=dtype)
    for number in range(12):
        optimizer = build(entry, model)
        if number:
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        run(model, optimizer, 1, start=number)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
    assert_equal(model, whole)
    for p in model.parameters():
        assert p.dtype == dtype
        assert p.isfinite().all()
    for state in optimizer.state.values():
        assert all(value.dtype == dtype for value in state.values() if value.is_floating_point() and value.ndim)


def test_a_run_is_resumed_in_a_fresh_process(tmp_path):
    ends = {}
    for entry in OPTIMIZERS:
        model = new_model()
        optimizer = build(entry, model)
        run(model, optimizer, SAVED_AT)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / entry.name)
        ends[entry.name] = run(model, optimizer, LONG_RUN - SAVED_AT, start=SAVED_AT)
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=120)
    for name, end in ends.items():
        assert_equal(torch.load(tmp_path / f"{name}.end", weights_only=True), end.state_dict())


def resume(folder):
    for entry in OPTIMIZERS:
        saved = torch.load(f"{folder}/{entry.name}", weights_only=True)
        model = new_model()
        optimizer = build(entry, model)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run(model, optimizer, LONG_RUN - SAVED_AT, start=SAVED_AT)
        torch.save(model.state_dict(), f"{folder}/{entry.name}.end")


@each_optimizer
def test_a_state_can_be_loaded_into_an_optimizer_that_has_one(entry):
    model, other = new_model(), new_model(1)
    optimizer, second = build(entry, model), build(entry, other)
    run(model, optimizer, 3)
    run(other, second, 5)
    other.load_state_dict(model.state_dict())
    for _ in range(2):
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(other, second, 3, start=3)
    run(model, optimizer, 3, start=3)
    assert_equal(model, other)


@each_optimizer
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_the_same_way_and_are_independent(entry, duplicate):
    model = new_model()
    optimizer = build(entry, model)
    run(model, optimizer, 3)
    model_2, optimizer_2 = duplicate((model, optimizer))
    run(model_2, optimizer_2, 3, start=3)
    model_3, optimizer_3 = duplicate((model, optimizer))
    run(model, optimizer, 3, start=3)
    run(model_3, optimizer_3, 3, start=3)
    assert_equal(model_2, model)
    assert_equal(model_3, model)
    optimizer_3.load_state_dict(optimizer_2.state_dict())
    assert repr(optimizer_3) == repr(optimizer)


@each_optimizer
@pytest.mark.parametrize("wrong", ["shape", "group", "parameter", "hyperparameter", "no tensor", "other optimizer"])
def test_a_wrong_state_is_refused_before_anything_changes(entry, wrong):
    model, other = new_model(), new_model()
    optimizer = build(entry, model)
    run(model, optimizer, 2)
    before = snapshot(model, optimizer)
    if wrong == "shape":
        other.conv, other.norm = nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)
        other.hidden[0] = other.hidden[1] = nn.Linear(8, 8)
        other.head, other.embed = nn.Linear(8, 7), nn.Embedding(9, 8)
    second = build(entry, other)
    run(other, second, 2)
    state = second.state_dict()
    if wrong == "group":
        state["param_groups"] = [*state["param_groups"], {**state["param_groups"][0], "params": []}]
    elif wrong == "parameter":
        state["param_groups"] = copy.deepcopy(state["param_groups"])
        state["param_groups"][0]["params"].append(99)
    elif wrong == "hyperparameter":
        state["param_groups"] = copy.deepcopy(state["param_groups"])
        del state["param_groups"][-1]["weight_decay"]
    elif wrong == "no tensor":
        state["state"] = {key: dict.fromkeys(value, 0.0) for key, value in state["state"].items()}
    elif wrong == "other optimizer":
        third = torch.optim.Adagrad([{"params": group["params"]} for group in second.param_groups])
        run(other, third, 1)
        state |= third.state_dict()
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert_equal(snapshot(model, optimizer), before)


@each_optimizer
def test_a_gradient_that_is_not_finite_spoils_its_own_tensor_only(entry):
    if entry.name in ONE_RATE:
        pytest.skip(ONE_RATE[entry.name])
    if entry.name in BEYOND_GRADIENTS:
        pytest.skip(BEYOND_GRADIENTS[entry.name])
    spoilt, clean = new_model(), new_model()
    apart = {"per_tensor": True} if takes(entry, "per_tensor") else {}  # one norm for all tensors would be spoilt
    optimizers = build(entry, spoilt, **apart), build(entry, clean, **apart)
    for number in range(3):
        clean.zero_grad()
        loss_of(clean, number).backward()
        for p, q in zip(spoilt.parameters(), clean.parameters(), strict=True):
            p.grad = q.grad.clone()
        if number == 1:
            spoilt.hidden[2].weight.grad[0, 0] = math.nan
            spoilt.gain.grad.fill_(math.inf)
        for optimizer in optimizers:
            optimizer.step()
    bad = {"hidden.2.weight", "gain"}
    for (name, p), q in zip(spoilt.named_parameters(), clean.parameters(), strict=True):
        assert name in bad or torch.equal(p, q)
        if name not in bad:
            assert_equal(optimizers[0].state.get(p), optimizers[1].state.get(q))


@each_optimizer
def test_a_gradient_scaler_skips_what_has_overflowed(entry):
    model = new_model()
    optimizer, scaler = build(entry, model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(4):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        if number == 2:
            model.head.bias.grad[0] = math.inf
        seen = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if number == 2:
            assert_equal(model.state_dict(), seen)
            assert_equal(optimizer.state_dict(), before[1])
        else:
            assert not torch.equal(model.head.weight, seen["head.weight"])


@each_optimizer
def test_it_can_be_compiled_once_for_all_steps_of_a_schedule(entry, unchecked):
    torch.compiler.reset()
    compiled, eager = new_model(), new_model()
    optimizers = build(entry, compiled, weight_decay=0.1), build(entry, eager, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(optimizers[0].step, backend=count)
    for number in range(5):
        run(compiled, optimizers[0], 1, start=number, step=step)
        run(eager, optimizers[1], 1, start=number)
        if number == 1:
            first = len(graphs)
        for schedule in schedules:
            schedule.step()
    assert len(graphs) == first > 0
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@each_optimizer
def test_the_layout_in_memory_does_not_matter(entry):
    plain, strided = new_model(), new_model()
    strided.conv.weight.data = strided.conv.weight.data.to(memory_format=torch.channels_last)
    strided.head.weight.data = strided.head.weight.data.T.contiguous().T
    run(plain, build(entry, plain), 4)
    run(strided, build(entry, strided), 4)
    assert not strided.head.weight.is_contiguous()
    for p, q in zip(strided.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@each_optimizer
def test_no_global_randomness_is_touched(entry):
    model = new_model()
    before = torch.get_rng_state()
    run(model, build(entry, model), 3)
    assert torch.equal(torch.get_rng_state(), before)


@each_optimizer
def test_arguments_out_of_range_are_refused_by_name(entry, unchecked):
    model = new_model()
    bad = {
        "lr": (-0.1, math.nan, math.inf),
        "weight_decay": (-0.1, math.nan),
        "eps": (-1e-8, math.nan),
        "betas": ((1.0, 0.9), (0.9, -0.1), (math.nan, 0.9), (0.9,)),
        "momentum": (1.0, -0.1, math.nan),
    }
    for name, values in bad.items():
        for value in values if takes(entry, name) else ():
            with pytest.raises(ValueError, match=name):
                build(entry, model, **{name: value})
            group = {**groups_of(entry, model)[0], name: value}
            with pytest.raises(ValueError, match=name):
                build(entry, model, params=[group])
    with pytest.raises(ValueError, match="empty"):
        build(entry, model, params=[])


if __name__ == "__main__":
    torch.set_num_threads(1)
    resume(sys.argv[1])
