"""What every registered loss must do. A new one is enrolled by its `@method(slot="…loss")` alone."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.registry import index

from .kinds import KINDS, SETTING, generator, takes_index

LOSSES = [entry for entry in index() if entry.slot.endswith("loss") and entry.slot != "regression_loss"]
NOT_COMPILED = {  # losses that torch.compile cannot take whole, and why
    "EnsLoss": "torch.compile does not trace the generator that it draws from",
    "MetricMix": "its λ come from SciPy",
}
OF_FIXED_CLASSES = {"AMCL"}  # losses with weights or memories of their own, in which classes are not alike
# losses through part of which no gradient goes; their own tests hold the rest against finite differences
NOT_DIFFERENTIATED = {
    "DCLWLoss": "its weights are constants",
    "GroupOrderingLoss": "the gradient reaches the anchor only",
}

pytestmark = pytest.mark.parametrize("entry", LOSSES, ids=[entry.name for entry in LOSSES])


def build(entry, **options) -> nn.Module:
    """The loss as a task makes it; one that draws has a generator of its own, and others the same draws."""
    method = entry.load()
    arguments = {**method.bind(SETTING), **options}
    if "generator" in inspect.signature(method.factory).parameters:
        arguments["generator"] = generator(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of its own weights, if it has any
        return method.factory(**arguments)


def draws(entry) -> bool:
    return "generator" in inspect.signature(entry.load().factory).parameters


def of_the_batch(entry) -> bool:
    """Whether the value belongs to the batch as a whole, not to its samples."""
    return "reduction" not in inspect.signature(entry.load().factory).parameters


def call(loss, *arguments, rows=None):
    """The loss as the training loop calls it; `rows` are the samples' indices in the training set."""
    if not takes_index(loss):
        return loss(*arguments)
    return loss(*arguments, index=torch.arange(len(arguments[0])) if rows is None else rows)


def cast(entry, arguments, dtype):
    return tuple(argument.to(dtype) if argument.is_floating_point() else argument for argument in arguments)


def value_and_gradient(entry, loss, arguments):
    """The value, and its gradient in everything that the model made, as one row."""
    arguments = list(arguments)
    leaves = []
    for place in KINDS[entry.slot].scored:
        arguments[place] = arguments[place].detach().clone().requires_grad_()
        leaves.append(arguments[place])
    value = call(loss, *arguments)
    gradients = torch.autograd.grad(value.sum(), leaves)
    return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture
def unchecked(monkeypatch):
    """Shapes and types are left to the loss itself: the annotations' checks would come before its own."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def test_the_reductions_agree_and_mean_is_the_default(entry):
    arguments = KINDS[entry.slot].batch()
    if of_the_batch(entry):
        assert call(build(entry), *arguments).shape == ()
        return
    single = call(build(entry, reduction="none"), *arguments)
    assert single.ndim >= 1
    torch.testing.assert_close(call(build(entry, reduction="mean"), *arguments), single.mean())
    torch.testing.assert_close(call(build(entry, reduction="sum"), *arguments), single.sum())
    torch.testing.assert_close(call(build(entry), *arguments), single.mean())


def test_first_and_second_derivatives(entry):
    if entry.name in NOT_DIFFERENTIATED:
        pytest.skip(NOT_DIFFERENTIATED[entry.name])
    kind = KINDS[entry.slot]
    arguments = list(kind.batch(max(3, kind.fewest)))

    def value(*scored):
        for place, argument in zip(kind.scored, scored, strict=True):
            arguments[place] = argument
        return call(build(entry).double().eval(), *arguments)  # in training mode a call may change its own state

    leaves = tuple(arguments[place].requires_grad_() for place in kind.scored)
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_extreme_batches_have_finite_loss_and_gradient_of_their_dtype(entry, dtype):
    kind = KINDS[entry.slot]
    for arguments in (*kind.extremes(), kind.batch()):
        value, gradient = value_and_gradient(entry, build(entry), cast(entry, arguments, dtype))
        assert value.dtype == gradient.dtype == dtype
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_half_precision_agrees_with_the_loss_of_the_rounded_scores(entry):
    for dtype in (torch.float16, torch.bfloat16):
        arguments = KINDS[entry.slot].batch(dtype=dtype)
        value = call(build(entry), *arguments)
        exact = call(build(entry), *cast(entry, arguments, torch.float64))
        torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_autocast_is_finite(entry):
    kind = KINDS[entry.slot]
    for arguments in (*kind.extremes(), kind.batch()):
        with torch.autocast("cpu", torch.bfloat16):
            value, gradient = value_and_gradient(entry, build(entry), cast(entry, arguments, torch.float32))
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@settings(deadline=None, max_examples=10)
@given(data=st.data(), seed=st.integers(0, 99))
def test_permuted_samples_have_permuted_losses(entry, data, seed):
    kind = KINDS[entry.slot]
    arguments = kind.batch(seed=seed)
    if draws(entry):
        return
    order = torch.tensor(data.draw(st.permutations(range(len(arguments[0])))))
    options = {} if of_the_batch(entry) else {"reduction": "none"}
    plain = call(build(entry, **options), *arguments)
    permuted = call(build(entry, **options), *kind.permuted(arguments, order), rows=order)
    torch.testing.assert_close(permuted, plain[order] if plain.shape == order.shape else plain)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99))
def test_what_its_kind_calls_the_same_has_the_same_value(entry, seed):
    kind = KINDS[entry.slot]
    arguments = kind.batch(seed=seed)
    if entry.name in OF_FIXED_CLASSES:
        return
    value = call(build(entry).eval(), *arguments)
    for other in kind.same(arguments, seed):
        torch.testing.assert_close(call(build(entry).eval(), *other), value, rtol=1e-6, atol=1e-8)


def test_integers_may_be_of_a_smaller_type(entry):
    kind = KINDS[entry.slot]
    arguments = kind.batch()
    for dtype in (torch.int32, torch.int8):
        smaller = tuple(a.to(dtype) if place in kind.smaller else a for place, a in enumerate(arguments))
        torch.testing.assert_close(call(build(entry), *smaller), call(build(entry), *arguments))


def test_neither_the_inputs_nor_global_random_state_change(entry):
    arguments = KINDS[entry.slot].batch()
    loss, before, kept = build(entry), torch.get_rng_state(), [argument.clone() for argument in arguments]
    value_and_gradient(entry, loss, arguments)
    assert torch.equal(torch.get_rng_state(), before)
    for argument, copied in zip(arguments, kept, strict=True):
        assert torch.equal(argument, copied)


def test_compiled_whole_it_is_the_same(entry, unchecked):
    if entry.name in NOT_COMPILED:
        pytest.skip(NOT_COMPILED[entry.name])
    arguments = KINDS[entry.slot].batch(dtype=torch.float32)
    torch.compiler.reset()
    compiled, plain = build(entry), build(entry)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call meets the state that the first one left
        torch.testing.assert_close(
            value_and_gradient(entry, compiled, arguments), value_and_gradient(entry, plain, arguments)
        )


def test_state_dict_round_trip(entry):
    arguments = KINDS[entry.slot].batch()
    used, fresh = build(entry).eval() if draws(entry) else build(entry), build(entry)
    fresh.train(used.training)
    call(used, *arguments)
    file = io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    if draws(entry) and hasattr(used, "generator"):
        fresh.generator.set_state(used.generator.get_state())
    for _ in range(2):
        assert torch.equal(call(fresh, *arguments), call(used, *arguments))


def test_copies_and_pickles_are_equal_and_independent(entry):
    arguments = KINDS[entry.slot].batch()
    used = build(entry)
    call(used, *arguments)
    state = copy.deepcopy(used.state_dict())
    for other in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert repr(other) == repr(used)
        assert torch.equal(call(other, *arguments), call(copy.deepcopy(used), *arguments))
        for name, value in used.state_dict().items():
            assert torch.equal(value, state[name])


def test_the_repr_shows_every_hyperparameter(entry):
    loss = build(entry)
    for name in inspect.signature(type(loss)).parameters:
        assert name == "generator" or f"{name}=" in repr(loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_moves_to_another_dtype(entry, dtype):
    arguments = KINDS[entry.slot].batch(dtype=dtype)
    value, gradient = value_and_gradient(entry, build(entry).to(dtype), arguments)
    assert value.dtype == gradient.dtype == dtype
    plain = call(build(entry).to(dtype).double(), *cast(entry, arguments, torch.float64))
    torch.testing.assert_close(value.double(), plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_searched_hyperparameters_are_arguments_with_valid_ranges(entry):
    method = entry.load()
    for name, space in method.search.items():
        assert name in inspect.signature(method.factory).parameters
        for value in space.options if hasattr(space, "options") else (space.low, space.high):
            assert math.isfinite(call(build(entry, **{name: value}), *KINDS[entry.slot].batch()))


def test_misuse_is_refused_with_the_argument_named(entry, unchecked):
    for name, arguments in KINDS[entry.slot].misuses():
        with pytest.raises(ValueError, match=f"^{name} must be" if name else r"^\w+ must be"):
            call(build(entry), *arguments)
    if not of_the_batch(entry):
        with pytest.raises(ValueError, match="^reduction must be"):
            build(entry, reduction="average")


def test_every_kind_of_loss_is_known(entry):
    assert entry.slot in KINDS
