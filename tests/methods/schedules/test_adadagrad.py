import io
import math
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.schedules import (
    AdaGradNorm,
    AdaptiveBatchSampler,
    AdaptiveBatchSize,
    augmented_test,
    coordinate_norm_test,
    inner_product_test,
    norm_test,
    per_sample_gradients,
)

GRADS = {
    "w": torch.tensor([[1.0, 0], [2, 1], [0, -1], [3, 2]], dtype=torch.float64),
    "b": torch.tensor([1.0, 1, -2, 2], dtype=torch.float64),
}
MATRIX = torch.cat([GRADS["w"], GRADS["b"][:, None]], 1)
TESTS = [
    partial(norm_test, eta=0.5),
    partial(inner_product_test, theta=0.5),
    partial(augmented_test, theta=0.5, nu=0.25),
    partial(coordinate_norm_test, eta=0.5),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("eta", "required", "size"), [(0.5, 9.2121, 10), (1.0, 2.303, 4), (0.2, 57.58, 58)])
def test_the_norm_test_is_golden(eta, required, size):
    found = norm_test(GRADS, eta)
    assert found.variance == pytest.approx(6.333333, abs=5e-7)
    assert found.grad_norm_sq == pytest.approx(2.75)
    assert found.batch_size_required == pytest.approx(required, abs=5e-3)
    assert AdaptiveBatchSize(partial(norm_test, eta=eta), 4, 1000).update(GRADS) == size


def test_the_inner_product_test_is_golden():
    found = inner_product_test(GRADS, 0.5)
    assert found.variance == pytest.approx(11.416667, abs=5e-7)
    assert found.batch_size_required == pytest.approx(6.038567, abs=5e-7)
    assert AdaptiveBatchSize(partial(inner_product_test, theta=0.5), 4, 1000).update(GRADS) == 7
    blocks = partial(inner_product_test, theta=0.5, blockwise=True)
    assert blocks(GRADS).variance == pytest.approx(7.416667, abs=5e-7)
    assert AdaptiveBatchSize(blocks, 4, 1000).update(GRADS) == 4


@pytest.mark.parametrize(("nu", "required", "size"), [(1.0, 0.793388, 4), (0.25, 12.694215, 13)])
def test_the_orthogonality_test_is_golden(nu, required, size):
    test = partial(augmented_test, theta=1e3, nu=nu)
    assert test(GRADS).variance == pytest.approx(2.181818, abs=5e-7)
    assert test(GRADS).batch_size_required == pytest.approx(required, abs=5e-7)
    assert AdaptiveBatchSize(test, 4, 1000).update(GRADS) == size
    assert test(GRADS, blockwise=True).variance == pytest.approx(0.666667, abs=5e-7)


def test_the_augmented_test_is_the_larger_of_two():
    assert augmented_test(GRADS, 0.5, 1.0) == inner_product_test(GRADS, 0.5)
    assert augmented_test(GRADS, 0.5, 0.25).batch_size_required == pytest.approx(12.694215, abs=5e-7)


def test_the_coordinate_test_is_golden():
    for column, required in enumerate((2.962963, 26.666667, 48.0)):
        assert coordinate_norm_test(MATRIX[:, [column]], 0.5).batch_size_required == pytest.approx(required, abs=5e-7)
    assert coordinate_norm_test(GRADS, 0.5).batch_size_required == pytest.approx(48)
    dead = torch.cat([MATRIX, torch.zeros(4, 2, dtype=torch.float64)], 1)
    assert coordinate_norm_test(dead, 0.5).batch_size_required == pytest.approx(48)


@pytest.mark.parametrize("test", TESTS)
def test_a_matrix_is_the_same_as_its_blocks(test):
    assert test(MATRIX).batch_size_required == pytest.approx(test(GRADS).batch_size_required, rel=1e-12)


@pytest.mark.parametrize("test", TESTS)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_scale_and_order_do_not_matter(test, scale, seed):
    grads = normal(6, 5, seed=seed) + 1
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in grads.shape)
    required = test(grads).batch_size_required
    assert test(scale * grads).batch_size_required == pytest.approx(required, rel=1e-8)
    assert test(grads[rows][:, columns]).batch_size_required == pytest.approx(required, rel=1e-8)


@pytest.mark.parametrize("test", TESTS)
def test_equal_gradients_ask_for_nothing_and_none_at_all_for_everything(test):
    assert test(torch.ones(5, 3)).batch_size_required == 0
    assert AdaptiveBatchSize(test, 5, 100).update(torch.ones(5, 3)) == 5
    assert test(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])).batch_size_required == math.inf
    assert AdaptiveBatchSize(test, 5, 100).update(torch.zeros(5, 3)) == 100


def test_gaussian_gradients_ask_for_their_noise_over_their_mean():
    mean = normal(50)
    grads = mean + 0.7 * normal(10_000, 50, seed=1)
    expected = 50 * 0.49 / (0.25 * mean.square().sum().item())
    assert norm_test(grads, 0.5).batch_size_required == pytest.approx(expected, rel=0.05)


def test_at_a_stationary_point_the_batch_grows_by_one_over_eta_squared():
    required = [norm_test(normal(50, 200, seed=seed), 0.5).batch_size_required for seed in range(20)]
    assert sum(required) / len(required) == pytest.approx(50 / 0.25, rel=0.1)


def test_per_sample_gradients_are_those_of_one_sample_after_the_other():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    x, y = normal(5, 1, 3, 3), torch.tensor([0, 2, 1, 1, 0])
    found = per_sample_gradients(model, nn.CrossEntropyLoss(), x, y)
    for i in range(5):
        model.zero_grad()
        nn.CrossEntropyLoss()(model(x[i : i + 1]), y[i : i + 1]).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][i], gradient)
    chunked = per_sample_gradients(model, nn.CrossEntropyLoss(), x, y, chunk_size=2)
    torch.testing.assert_close(chunked, found)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()], ids=str)
def test_samples_that_meet_are_refused(norm):
    model = nn.Sequential(nn.Linear(2, 3), norm)
    with pytest.raises(ValueError, match="GroupNorm"):
        per_sample_gradients(model, nn.MSELoss(), torch.zeros(4, 2), torch.zeros(4, 3))


def test_batches_follow_the_size_that_is_set():
    sampler = AdaptiveBatchSampler(23, 2, 20, seed=1)
    batches = []
    for batch in sampler:
        batches.append(batch)
        sampler.batch_size = min(20, 2 * sampler.batch_size)
    assert [len(batch) for batch in batches] == [2, 4, 8, 9]
    assert sorted(chain(*batches)) == list(range(23))
    again = AdaptiveBatchSampler(23, 20, 20, seed=1)
    whole = list(again)
    assert list(chain(*whole)) == list(chain(*batches))
    assert list(again) != whole
    loader = torch.utils.data.DataLoader(torch.arange(9), batch_sampler=AdaptiveBatchSampler(9, 4, 4))
    assert [len(batch) for batch in loader] == [4, 4]  # a single sample is left out


def test_sizes_never_shrink_and_keep_their_bounds():
    noisy, clear = torch.tensor([[1.0], [-0.5], [0.2]]), torch.tensor([[1.0], [1.1], [0.9]])
    size = AdaptiveBatchSize(partial(norm_test, eta=0.5), 3, 100, interval=2, growth_cap=3.0)
    assert not size.due
    assert size.update() == 3
    assert size.due
    assert size.update(noisy) == 9
    assert [size.update(noisy) for _ in range(2)] == [9, 27]
    assert [size.update(clear) for _ in range(2)] == [27, 27]
    assert [size.update(noisy) for _ in range(4)] == [27, 42, 42, 42]
    assert size.step == 10
    with pytest.raises(ValueError, match="per_sample_grads"):
        [size.update() for _ in range(2)]


WEIGHTS, GRADIENT = ([[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [0.0, 1.0]])


def test_one_step_of_adagrad_norm_is_golden():
    p = nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
    p.grad = torch.tensor(GRADIENT, dtype=torch.float64)
    AdaGradNorm([p], lr=0.5).step()
    expected = torch.tensor([[0.705882, 1.607843], [3, 3.901961]], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected, atol=5e-7, rtol=0)


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=100 * step + i).to(p.dtype)
        optimizer.step()


def parameters(*dtypes):
    shapes = (3,), (6, 2), (2, 7), (2, 3, 2, 2), ()
    return [nn.Parameter(normal(*shape, seed=i).to(dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("per_tensor", [False, True])
def test_many_steps_are_the_formula(per_tensor):
    params = parameters(torch.float64)
    reference = [p.detach().clone() for p in params]
    optimizer = AdaGradNorm(params, 0.3, 0.2, 0.01, 1e-3, per_tensor)
    v = [0.2] * len(params)
    for step in range(30):
        run(optimizer, params, 1, step)
        squares = [p.grad.square().sum().item() for p in params]
        v = [total + (square if per_tensor else sum(squares)) for total, square in zip(v, squares, strict=True)]
        for x, p, total in zip(reference, params, v, strict=True):
            x.mul_(1 - 0.3 * 0.01).sub_(p.grad * (0.3 / (math.sqrt(total) + 1e-3)))
    for x, p in zip(reference, params, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-10, atol=1e-12)


def test_the_norm_is_that_of_all_groups():
    together, apart = parameters(torch.float64), parameters(torch.float64)
    optimizers = AdaGradNorm(together), AdaGradNorm([{"params": apart[:2]}, {"params": apart[2:]}])
    for optimizer, params in zip(optimizers, (together, apart), strict=True):
        run(optimizer, params, 5)
    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q)


def test_mixed_dtypes_are_the_same_one_by_one_and_resume_from_a_file():
    whole, single, resumed = (parameters(torch.float64, torch.bfloat16, torch.float32) for _ in range(3))
    run(AdaGradNorm(whole), whole, 12)
    run(AdaGradNorm(single, foreach=False), single, 12)
    first, second = AdaGradNorm(resumed), AdaGradNorm(resumed)
    run(first, resumed, 7)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, resumed, 5, 7)
    for p, q, r in zip(whole, single, resumed, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_scaling_the_loss_matters_ever_less():
    first, second = parameters(torch.float64), parameters(torch.float64)
    optimizers = [AdaGradNorm(params, initial_accumulator=1e-12) for params in (first, second)]
    for p, q in zip(first, second, strict=True):
        p.grad = normal(*p.shape)
        q.grad = 1e3 * p.grad
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: norm_test(GRADS, 0.0), "eta"),
        (lambda: norm_test(GRADS, math.nan), "eta"),
        (lambda: coordinate_norm_test(GRADS, -0.1), "eta"),
        (lambda: inner_product_test(GRADS, -1.0), "theta"),
        (lambda: augmented_test(GRADS, 0.5, 0.0), "nu"),
        (lambda: norm_test(torch.ones(1, 3), 0.5), "per_sample_grads"),
        (lambda: norm_test({"a": torch.ones(2, 3), "b": torch.ones(3)}, 0.5), "per_sample_grads"),
        (lambda: norm_test(torch.full((2, 3), math.nan), 0.5), "per_sample_grads"),
        (lambda: per_sample_gradients(nn.Linear(1, 1), nn.MSELoss(), torch.ones(3, 1), torch.ones(2, 1)), "y"),
        (lambda: AdaptiveBatchSampler(1, 2, 2), "dataset_size"),
        (lambda: AdaptiveBatchSampler(10, 2, 11), "maximum"),
        (lambda: AdaptiveBatchSampler(10, 1, 5), "initial"),
        (lambda: setattr(AdaptiveBatchSampler(10, 2, 5), "batch_size", 6), "batch_size"),
        (lambda: AdaptiveBatchSize(len, 5, 4), "initial"),
        (lambda: AdaptiveBatchSize(len, 2, 4, interval=0), "interval"),
        (lambda: AdaptiveBatchSize(len, 2, 4, growth_cap=1.0), "growth_cap"),
        (lambda: AdaGradNorm([torch.ones(1)], initial_accumulator=0.0), "initial_accumulator"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call()
