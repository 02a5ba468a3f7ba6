import copy
import gc
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.optimizers import KFAC, KFACLSTM
from fairtrial.methods.optimizers.kfac_hedging import Factors, damped_inverses, kl_clip_factor

F64 = torch.float64
A_ROWS = torch.tensor([[1.0, 2], [0, 1], [2, -1]], dtype=F64)
G_ROWS = torch.tensor([[0.5, -1], [1, 0], [-0.5, 0.5]], dtype=F64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def with_random_weights(model, seed=0):
    source = generator(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=source)
    return model.double()


def factors_of(optimizer, weight):
    return optimizer.records[weight].factors()


def inner(s, g):
    """A loss whose gradient for sample i is g_i."""
    return (s * g).flatten(1).sum(1).mean()


def test_golden_factors_and_update():
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer, lr=0.1, damping=0.1, kl_clip=math.inf, momentum=0.0)
    inner(layer(A_ROWS), G_ROWS).backward()
    A, S = factors_of(optimizer, layer.weight)
    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
    U = torch.tensor([[-0.304374, 0.227545, 0.389842], [-0.167248, -0.473787, 0.250922]], dtype=F64)
    golden = {
        "A": (A, [[1.666667, 0, 1], [0, 2, 0.666667], [1, 0.666667, 1]]),
        "S": (S, [[0.5, -0.25], [-0.25, 0.416667]]),
        "gradient": (gradient, [[-0.166667, 0.833333, 0.333333], [0, -0.833333, -0.166667]]),
    }
    for found, expected in golden.values():
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)
    A_inv, S_inv = damped_inverses(Factors(A, S), 0.1)
    torch.testing.assert_close(S_inv @ gradient @ A_inv, U, atol=1e-6, rtol=0)
    pi = math.sqrt(A.trace() / 3 / (S.trace() / 2))
    assert pi == pytest.approx(1.842265, abs=1e-6)
    block = torch.kron(S + 0.1**0.5 / pi * torch.eye(2), A + pi * 0.1**0.5 * torch.eye(3))
    torch.testing.assert_close(torch.linalg.solve(block, gradient.flatten()), (S_inv @ gradient @ A_inv).flatten())
    product = (U * gradient).sum()
    assert product.item() == pytest.approx(0.723299, abs=1e-6)
    assert kl_clip_factor(product, 0.1, 1e-3).item() == pytest.approx(0.371827, abs=1e-6)
    before = layer.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - layer.weight.detach(), 0.1 * U[:, :2], atol=1e-7, rtol=0)


def test_the_step_is_clipped():
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer, lr=0.1, damping=0.1, kl_clip=1e-3, momentum=0.0)
    inner(layer(A_ROWS), G_ROWS).backward()
    before = layer.bias.detach().clone()
    optimizer.step()
    expected = 0.1 * 0.371827 * torch.tensor([0.389842, 0.250922], dtype=F64)
    torch.testing.assert_close(before - layer.bias.detach(), expected, atol=1e-7, rtol=0)


def test_much_damping_leaves_the_gradient():
    factors = Factors(torch.eye(3, dtype=F64) + 0.3, torch.eye(2, dtype=F64) * 5)
    A_inv, S_inv = damped_inverses(factors, 1e12)
    gradient = randn(2, 3)
    torch.testing.assert_close(1e12 * S_inv @ gradient @ A_inv, gradient, rtol=1e-5, atol=1e-5)


def test_of_one_sample_the_factors_are_the_exact_empirical_fisher_block():
    layer = nn.Linear(3, 2).double()
    optimizer = KFAC(layer)
    layer(randn(1, 3)).square().sum().backward()
    A, S = factors_of(optimizer, layer.weight)
    flat = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
    torch.testing.assert_close(torch.kron(S, A), torch.outer(flat, flat))


def test_without_gradients_the_inverse_is_finite_and_an_ema_starts_at_the_first_factor():
    zero = Factors(torch.eye(2), torch.zeros(2, 2))
    for inverse, factor in zip(damped_inverses(zero, 0.01), zero, strict=True):
        torch.testing.assert_close(inverse, torch.linalg.inv(factor + 0.1 * torch.eye(2)))
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer, lr=0.0, ema=0.75)
    means = []
    for k in range(6):
        optimizer.zero_grad()
        inner(layer(A_ROWS + k), G_ROWS).backward()
        (found, _) = factors_of(optimizer, layer.weight)
        decay = min(1 - 1 / (k + 1), 0.75)
        means.append(found if k == 0 else decay * means[-1] + (1 - decay) * found)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[layer.weight]["A"], means[-1])


def test_steps_do_not_depend_on_an_affine_map_of_the_inputs():
    x, y = randn(64, 3), randn(64, 2, seed=1)
    mix, shift = randn(3, 3, seed=2), randn(3, seed=3)
    plain, mapped = (with_random_weights(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))) for _ in range(2))
    with torch.no_grad():  # the same function, of x M + b
        mapped[0].weight.copy_(plain[0].weight @ torch.linalg.inv(mix))
        mapped[0].bias.copy_(plain[0].bias - mapped[0].weight @ shift)
    for model, inputs in ((plain, x), (mapped, x @ mix.T + shift)):
        optimizer = KFAC(model, lr=0.1, damping=1e-16, t_inv=1, kl_clip=math.inf)
        for _ in range(3):
            optimizer.zero_grad()
            (model(inputs) - y).square().sum(1).mean().backward()
            optimizer.step()
    torch.testing.assert_close(mapped(x @ mix.T + shift), plain(x), rtol=1e-5, atol=1e-5)


def test_a_convolution_is_a_linear_map_at_every_pixel():
    conv, linear = nn.Conv2d(2, 3, (2, 3), stride=2, padding=1, dilation=(1, 2)).double(), nn.Linear(12, 3).double()
    x = randn(4, 2, 7, 9)
    patches = F.unfold(x, (2, 3), (1, 2), 1, 2).mT
    optimizers = KFAC(conv), KFAC(linear)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    conv(x).flatten(2).mT.pow(3).sum((1, 2)).mean().backward()
    linear(patches).pow(3).sum((1, 2)).mean().backward()
    torch.testing.assert_close(factors_of(optimizers[0], conv.weight), factors_of(optimizers[1], linear.weight))
    torch.testing.assert_close(conv.weight.grad.flatten(1), linear.weight.grad)


def test_calls_in_one_pass_are_places_and_passes_are_samples():
    x, g = randn(6, 4, 3), randn(6, 4, 2, seed=1)
    found = []
    for way in ("at once", "call by call", "pass by pass"):
        layer = with_random_weights(nn.Linear(3, 2))
        optimizer = KFAC(layer)
        if way == "at once":
            inner(layer(x), g).backward()
        elif way == "call by call":
            sum(inner(layer(x[:, t]), g[:, t]) for t in range(4)).backward()
        else:
            for part in (slice(0, 2), slice(2, 6)):
                (inner(layer(x[part]), g[part]) * len(x[part]) / 6).backward()
        found.append(factors_of(optimizer, layer.weight))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    flat = F.pad(x, (0, 1), value=1.0).flatten(0, 1)
    torch.testing.assert_close(found[0].A, flat.T @ flat / 24)
    torch.testing.assert_close(found[0].S, 4 * g.flatten(0, 1).T @ g.flatten(0, 1) / 24)


def test_reduced_factors_are_exact_where_all_inputs_of_a_sample_are_the_same():
    x, g = randn(1, 1, 3).expand(1, 5, 3), randn(1, 5, 2, seed=1)
    layer = with_random_weights(nn.Linear(3, 2))
    optimizer = KFAC(layer, recurrent="reduce")
    inner(layer(x), g).backward()
    A, S = factors_of(optimizer, layer.weight)
    flat = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
    torch.testing.assert_close(torch.kron(S, A), torch.outer(flat, flat))


def test_gauss_newton_factors_are_those_of_the_output_bent_as_the_loss():
    x, y = randn(8, 3), randn(8, seed=1)
    model = with_random_weights(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)))
    optimizer, plain = KFAC(model, curvature="ggn"), KFAC(model)
    output = model(x)
    losses = (output - y) ** 4
    optimizer.observe(output, losses)
    assert all(p.grad is None for p in model.parameters())
    found = [factors_of(optimizer, model[k].weight) for k in (0, 2)]
    losses.mean().backward()
    expected = [factors_of(plain, model[k].weight) for k in (0, 2)]
    torch.testing.assert_close(
        [factors_of(optimizer, model[k].weight) for k in (0, 2)], found
    )  # the loss's own pass leaves them
    plain.zero_grad()
    ((12 * (output.detach() - y) ** 2).sqrt() * model(x)).mean().backward()
    torch.testing.assert_close(found, [factors_of(plain, model[k].weight) for k in (0, 2)])
    assert not torch.allclose(found[0].S, expected[0].S)
    optimizer.step()


def test_a_linear_loss_has_no_gauss_newton_curvature_and_other_curvatures_are_not_observed():
    layer = nn.Linear(3, 1).double()
    optimizer = KFAC(layer, curvature="ggn")
    output = layer(randn(4, 3)).flatten()
    optimizer.observe(output, 2 * output)
    assert not factors_of(optimizer, layer.weight).S.any()
    with pytest.raises(ValueError, match="curvature"):
        KFAC(layer).observe(output, output.square())
    optimizer = KFAC(layer, curvature="ggn")
    layer(randn(4, 3)).square().mean().backward()
    with pytest.raises(RuntimeError, match="observe"):
        optimizer.step()


def test_a_bias_that_is_not_trained_counts_with_a_gradient_of_0():
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer, [layer.weight], lr=0.1, damping=0.1, kl_clip=math.inf, momentum=0.0)
    before = copy.deepcopy(layer)
    inner(layer(A_ROWS), G_ROWS).backward()
    A_inv, S_inv = damped_inverses(factors_of(optimizer, layer.weight), 0.1)
    optimizer.step()
    assert torch.equal(layer.bias, before.bias)
    torch.testing.assert_close(
        before.weight - layer.weight, 0.1 * S_inv @ layer.weight.grad @ A_inv[:2, :2], rtol=1e-10, atol=0
    )


def test_other_parameters_are_left_to_sgd():
    def new():
        return with_random_weights(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)))

    model, reference = new(), new()
    for each in (model, reference):
        each.append(nn.Linear(4, 4, bias=False))
        each[3].weight = each[2].weight  # shared by two layers
    optimizers = [
        KFAC(model, lr=0.1, weight_decay=0.1),
        torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9),
    ]
    tokens = torch.randint(5, (6, 3), generator=generator())
    for _ in range(4):
        for each, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            each(tokens).square().mean().backward()
            if each is reference:
                with torch.no_grad():
                    torch._foreach_mul_(list(each.parameters()), 1 - 0.1 * 0.1)
            optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not optimizers[0].records


def test_layers_of_other_kinds_have_no_factors():
    odd = [
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(2, 2, 3),
        nn.LSTM(2, 2),
        nn.Bilinear(2, 2, 2),
    ]
    assert not KFAC(nn.ModuleList(odd)).records
    assert len(KFAC(KFACLSTM(2, 2, 3)).records) == 6


def trained(model, optimizer, steps, start=0):
    for number in range(start, start + steps):
        optimizer.zero_grad()
        x = randn(16, 5, 3, seed=number)
        model(x)[0].square().sum((1, 2)).mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_factors_and_inverses_are_renewed_when_they_are_due():
    model = with_random_weights(KFACLSTM(3, 2))
    optimizer = KFAC(model, t_cov=2, t_inv=3)
    state = optimizer.state[model.input_maps[0].weight]
    seen = []
    for number in range(7):
        trained(model, optimizer, 1, number)
        state = optimizer.state[model.input_maps[0].weight]
        seen.append((state["A"].clone(), state["A_inv"].clone()))
    changed = [[not torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(seen)]
    assert changed == [[False, False], [True, False], [False, True], [True, False], [False, False], [True, True]]


@pytest.mark.parametrize("saved_at", [3, 4, 6])
def test_a_run_resumed_between_two_inversions_is_the_same(saved_at):
    options = {"t_cov": 2, "t_inv": 3, "lr": 0.1}
    whole = with_random_weights(KFACLSTM(3, 2))
    trained(whole, optimizer := KFAC(whole, **options), saved_at)
    resumed = copy.deepcopy(whole)
    second = KFAC(resumed, **options)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = trained(whole, optimizer, 5, saved_at), trained(resumed, second, 5, saved_at)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_a_gradient_that_is_not_finite_spoils_neither_factors_nor_other_layers():
    model, clean = (with_random_weights(KFACLSTM(3, 2)) for _ in range(2))
    optimizers = [KFAC(each, lr=0.1) for each in (model, clean)]
    for each, optimizer in zip((model, clean), optimizers, strict=True):
        trained(each, optimizer, 2)
        each(randn(16, 5, 3))[0].square().sum((1, 2)).mean().backward()
    model.input_maps[0].weight.grad[0, 0] = math.nan
    for optimizer in optimizers:
        optimizer.step()
    assert model.hidden_maps[0].weight.isfinite().all()
    assert all(value.isfinite().all() for value in optimizers[0].state[model.hidden_maps[0].weight].values())
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer)
    for factor in (1.0, math.inf):
        optimizer.zero_grad()
        (factor * inner(layer(A_ROWS), G_ROWS)).backward()
        optimizer.step()
        assert optimizer.state[layer.weight]["S"].isfinite().all()


def test_hooks_go_with_the_optimizer_and_copies_have_their_own():
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer)
    layer_2, optimizer_2 = copy.deepcopy((layer, optimizer))
    assert layer._forward_hooks
    del optimizer
    gc.collect()
    assert not layer._forward_hooks
    inner(layer_2(A_ROWS), G_ROWS).backward()
    assert factors_of(optimizer_2, layer_2.weight) is not None
    del optimizer_2
    gc.collect()
    assert not layer_2._forward_hooks


def test_zero_grad_forgets_what_was_recorded():
    layer = nn.Linear(2, 2).double()
    optimizer = KFAC(layer)
    inner(layer(A_ROWS), G_ROWS).backward()
    optimizer.zero_grad()
    assert factors_of(optimizer, layer.weight) is None


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_is_torchs(layers):
    lstm = nn.LSTM(3, 4, layers, batch_first=True).double()
    ours = KFACLSTM.from_lstm(lstm)
    x, state = randn(5, 6, 3), (randn(layers, 5, 4, seed=1), randn(layers, 5, 4, seed=2))
    torch.testing.assert_close(ours(x), lstm(x))
    torch.testing.assert_close(ours(x, state), lstm(x, state))
    ours(x)[0].square().mean().backward()
    lstm(x)[0].square().mean().backward()
    torch.testing.assert_close(ours.hidden_maps[0].weight.grad, lstm.weight_hh_l0.grad)
    torch.testing.assert_close(ours.input_maps[-1].weight.grad, getattr(lstm, f"weight_ih_l{layers - 1}").grad)


@pytest.mark.parametrize("options", [{"bias": False}, {"bidirectional": True}, {"proj_size": 2}])
def test_other_lstms_are_refused(options):
    with pytest.raises(ValueError, match="lstm"):
        KFACLSTM.from_lstm(nn.LSTM(3, 4, **options))
    with pytest.raises(ValueError, match="hidden_size"):
        KFACLSTM(3, 0)


def test_an_ill_conditioned_problem_takes_fewer_steps_than_with_sgd():
    x = randn(256, 6) * torch.logspace(-1, 1, 6, dtype=F64)
    y = torch.tanh(x @ randn(6, 2, seed=1))
    losses = {}
    for name in ("SGD", "KFAC"):
        best = math.inf
        for lr in (0.01, 0.1, 1.0):
            model = with_random_weights(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
            sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
            optimizer = sgd if name == "SGD" else KFAC(model, lr=lr)
            for _ in range(60):
                optimizer.zero_grad()
                loss = (model(x) - y).square().sum(1).mean()
                loss.backward()
                optimizer.step()
            if loss.isfinite():
                best = min(best, loss.item())
        losses[name] = best
    assert losses["KFAC"] < 0.7 * losses["SGD"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"damping": 0.0},
        {"damping": math.nan},
        {"ema": 1.0},
        {"t_cov": 0},
        {"t_inv": 1.5},
        {"kl_clip": 0.0},
        {"kl_clip": math.nan},
    ],
)
def test_misuse_is_refused_with_the_argument_named(arguments):
    layer = nn.Linear(2, 2)
    (name,) = arguments
    with pytest.raises((ValueError, TypeError), match=name):
        KFAC(layer, **arguments)
    with pytest.raises(ValueError, match=name):
        KFAC(layer, [{"params": layer.parameters(), **arguments}])


def test_unknown_ways_are_refused():
    for name in ("recurrent", "curvature"):
        with pytest.raises(ValueError, match=name):
            KFAC(nn.Linear(2, 2), **{name: "other"})
    with pytest.raises(ValueError, match="damping"):
        damped_inverses(Factors(torch.eye(2), torch.eye(2)), 0.0)
