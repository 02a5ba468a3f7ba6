"""What every registered loss over class scores must do. A new one is enrolled by its `@method(slot="loss")` alone."""

import copy
import inspect
import io
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.registry import index

N, CLASSES = 6, 5
SETTING = SimpleNamespace(num_samples=N, num_classes=CLASSES)
LOSSES = [entry for entry in index() if entry.slot == "loss"]
NOT_COMPILED: dict[str, str] = {}  # name of a loss that torch.compile cannot take whole, and why

pytestmark = pytest.mark.parametrize("entry", LOSSES, ids=[entry.name for entry in LOSSES])


def build(entry, **options) -> nn.Module:
    method = entry.load()
    return method.factory(**method.bind(SETTING), **options)


def call(loss, scores, target, rows=None):
    """The loss as the training loop calls it; `rows` are the samples' indices in the training set."""
    if "index" not in inspect.signature(loss.forward).parameters:
        return loss(scores, target)
    return loss(scores, target, index=torch.arange(len(scores)) if rows is None else rows)


def batch(n=N, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(n, CLASSES, generator=generator, dtype=torch.float64)
    return scores.to(dtype), torch.randint(CLASSES, (n,), generator=generator)


def value_and_gradient(loss, scores, target):
    scores = scores.detach().clone().requires_grad_()
    value = call(loss, scores, target)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    return value.detach(), gradient


@pytest.fixture
def unchecked(monkeypatch):
    """Shapes and types are left to the loss itself: the annotations' checks would come before its own."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def test_the_reductions_agree_and_mean_is_the_default(entry):
    scores, target = batch()
    single = call(build(entry, reduction="none"), scores, target)
    assert single.shape == (N,)
    torch.testing.assert_close(call(build(entry, reduction="mean"), scores, target), single.mean())
    torch.testing.assert_close(call(build(entry, reduction="sum"), scores, target), single.sum())
    torch.testing.assert_close(call(build(entry), scores, target), single.mean())


def test_first_and_second_derivatives(entry):
    scores, target = batch(3)
    loss = build(entry, reduction="none").double().eval()  # in training mode a call may change the loss's own state
    leaf = scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: call(loss, s, target), leaf)
    assert torch.autograd.gradgradcheck(lambda s: call(loss, s, target), leaf)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_scores_have_finite_loss_and_gradient_of_their_dtype(entry, dtype):
    target = torch.arange(N) % CLASSES
    up = torch.full((N, CLASSES), 1e4)
    right = torch.where(torch.arange(CLASSES) == target[:, None], up, -up)
    mixed = torch.where(batch()[0] > 0, up, -up)
    for scores in (up, -up, right, -right, mixed, batch()[0]):
        value, gradient = value_and_gradient(build(entry), scores.to(dtype), target)
        assert value.dtype == gradient.dtype == dtype
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_half_precision_agrees_with_the_loss_of_the_rounded_scores(entry):
    for dtype in (torch.float16, torch.bfloat16):
        scores, target = batch(dtype=dtype)
        value = call(build(entry), scores, target)
        exact = call(build(entry), scores.double(), target)
        torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_small_and_uniform_batches_are_finite(entry):
    scores, target = batch()
    tied = torch.tensor([1.0, 3, 3, 3, -2]).expand(N, CLASSES)
    for case in (
        (scores[:1], target[:1]),  # one sample
        (scores, torch.zeros(N, dtype=torch.long)),  # one class present
        (torch.zeros(N, CLASSES), target),  # nothing to tell the classes apart
        (torch.full((N, CLASSES), -3.0), target),
        (tied, torch.full((N,), 1)),
        (tied, torch.full((N,), 4)),
    ):
        value, gradient = value_and_gradient(build(entry), *case)
        assert value.isfinite()
        assert gradient.isfinite().all()


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(N)), seed=st.integers(0, 99))
def test_permuted_samples_have_permuted_losses(entry, order, seed):
    scores, target = batch(seed=seed)
    order = torch.tensor(order)
    plain = call(build(entry, reduction="none"), scores, target)
    permuted = call(build(entry, reduction="none"), scores[order], target[order], order)
    torch.testing.assert_close(permuted, plain[order])


def test_targets_may_be_of_a_smaller_integer_type(entry):
    scores, target = batch()
    for dtype in (torch.int32, torch.int8):
        torch.testing.assert_close(call(build(entry), scores, target.to(dtype)), call(build(entry), scores, target))


def test_neither_the_inputs_nor_global_random_state_change(entry):
    scores, target = batch()
    before, kept = torch.get_rng_state(), (scores.clone(), target.clone())
    value_and_gradient(build(entry), scores, target)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(scores, kept[0])
    assert torch.equal(target, kept[1])


def test_compiled_whole_it_is_the_same(entry, unchecked):
    if entry.name in NOT_COMPILED:
        pytest.skip(NOT_COMPILED[entry.name])
    scores, target = batch(dtype=torch.float32)
    torch.compiler.reset()
    compiled, plain = build(entry), build(entry)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call meets the state that the first one left
        torch.testing.assert_close(
            value_and_gradient(compiled, scores, target), value_and_gradient(plain, scores, target)
        )


def test_state_dict_round_trip(entry):
    scores, target = batch()
    used, fresh = build(entry), build(entry)
    call(used, scores, target)
    file = io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert torch.equal(call(fresh, scores, target), call(used, scores, target))


def test_copies_and_pickles_are_equal_and_independent(entry):
    scores, target = batch()
    used = build(entry)
    call(used, scores, target)
    state = copy.deepcopy(used.state_dict())
    for other in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert repr(other) == repr(used)
        assert torch.equal(call(other, scores, target), call(copy.deepcopy(used), scores, target))
        for name, value in used.state_dict().items():
            assert torch.equal(value, state[name])


def test_the_repr_shows_every_hyperparameter(entry):
    loss = build(entry)
    for name in inspect.signature(type(loss)).parameters:
        assert f"{name}=" in repr(loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_moves_to_another_dtype(entry, dtype):
    scores, target = batch(dtype=dtype)
    value, gradient = value_and_gradient(build(entry).to(dtype), scores, target)
    assert value.dtype == gradient.dtype == dtype
    plain = call(build(entry), scores.double(), target)
    torch.testing.assert_close(value.double(), plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_searched_hyperparameters_are_arguments_with_valid_ranges(entry):
    method = entry.load()
    for name, space in method.search.items():
        assert name in inspect.signature(method.factory).parameters
        for value in space.options if hasattr(space, "options") else (space.low, space.high):
            assert math.isfinite(call(build(entry, **{name: value}), *batch()))


def test_misuse_is_refused_with_the_argument_named(entry, unchecked):
    scores, target = batch()
    for name, arguments in [
        ("input", (scores[:0], target[:0])),
        ("input", (scores[0], target)),
        ("input", (scores[None], target)),
        ("input", (scores[:, :1], torch.zeros(N, dtype=torch.long))),
        ("input", (scores.long(), target)),
        ("target", (scores, target[:-1])),
        ("target", (scores, target[:, None])),
        ("target", (scores, target.double())),
        ("target", (scores, torch.full((N,), CLASSES))),
        ("target", (scores, torch.full((N,), -1))),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call(build(entry), *arguments)
    with pytest.raises(ValueError, match="^reduction must be"):
        build(entry, reduction="average")
