import io
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairtrial.methods.optimizers import FRUGAL, frugal_param_groups, optimizer_state_bytes
from fairtrial.methods.registry import index

F64 = torch.float64
W = torch.tensor([[1.0, 2, 3], [0, 1, 0], [2, 0, 2], [-1, 1, 0.5]], dtype=F64)
G1 = torch.tensor([[1, 0.3, -0.2], [0.1, 2, 0.4], [0.5, -0.6, 3], [0.2, 0.7, -0.9]], dtype=F64)
G2 = torch.tensor([[0.4, 1, 0.1], [1, -0.3, 0.8], [0.5, 0.2, 1], [-0.7, 0.6, 0.3]], dtype=F64)
PROJECTIONS = ["block", "columns", "rows", "randk", "svd", "random"]


def projected(params, **options):
    return FRUGAL([{"params": list(params), "projectable": True}], **options)


def walk(optimizer, gradients):
    """The single weight of an optimizer after each step along given gradients."""
    (w,) = optimizer.param_groups[0]["params"]
    path = []
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        path.append(w.detach().clone())
    return path


def random_steps(shapes, steps, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]
    return starts, [[torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in shapes] for _ in range(steps)]


def train(optimizer, gradients):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in gradients:
        for p, gradient in zip(params, step, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


def parameters(starts):
    return [nn.Parameter(start.clone()) for start in starts]


SVD_GOLDEN = {
    "sign": [
        [0.648475, 1.644662, 3.221923],
        [-0.369046, 1.089354, 0.067866],
        [1.806657, -0.248670, 1.454231],
        [-0.809073, 0.654832, 0.424528],
    ],
    "sgd": [
        [0.791705, 1.723136, 3.117673],
        [-0.177057, 0.827594, -0.069269],
        [1.877162, -0.040322, 1.711234],
        [-0.822200, 0.792116, 0.639390],
    ],
    "none": [
        [0.948475, 1.944662, 3.121923],
        [-0.069046, 0.989354, -0.032134],
        [1.906657, 0.051330, 1.754231],
        [-0.909073, 0.954832, 0.724528],
    ],
}


@pytest.mark.parametrize("state_free", SVD_GOLDEN)
@pytest.mark.parametrize("dead_zone", [None, 0.0])
def test_golden_steps_with_svd(state_free, dead_zone):
    optimizer = projected(
        [nn.Parameter(W.clone())],
        lr=0.1,
        density=1 / 3,
        update_gap=2,
        projection="svd",
        state_free=state_free,
        dead_zone=dead_zone,
    )
    path = walk(optimizer, [G1, G2, G2])
    torch.testing.assert_close(path[-1], torch.tensor(SVD_GOLDEN[state_free], dtype=F64), atol=2e-6, rtol=0)


def generator_whose_first_draws_are(total, *draws):
    """A generator in which each of the first permutations of `total` begins with what is asked for."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        if all(int(torch.randperm(total, generator=generator)[0]) == draw for draw in draws):
            return generator.manual_seed(seed)
    raise AssertionError


def test_golden_steps_with_columns():
    optimizer = projected(
        [nn.Parameter(W.clone())],
        lr=0.1,
        density=1 / 3,
        update_gap=2,
        projection="columns",
        state_free_lr_scale=0.1,
        generator=generator_whose_first_draws_are(3, 0, 0),
    )
    expected = [
        [[0.9, 1.99, 3.01], [-0.1, 0.99, -0.01], [1.9, 0.01, 1.99], [-1.1, 0.99, 0.51]],
        [[0.810142, 1.98, 3.0], [-0.180709, 1.0, -0.02], [1.8, 0, 1.98], [-1.046846, 0.98, 0.5]],
        [[0.710142, 1.97, 2.99], [-0.280709, 1.01, -0.03], [1.7, -0.01, 1.97], [-0.946846, 0.97, 0.49]],
    ]
    path = torch.stack(walk(optimizer, [G1, G2, G2]))
    torch.testing.assert_close(path, torch.tensor(expected, dtype=F64), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("order", "pattern"),
    [
        ("ascending", ["1100", "1100", "0011", "0011", "1100"]),
        ("descending", ["0011", "0011", "1100", "1100", "0011"]),
        ("mirror", ["1001", "1001", "0110", "0110", "1001"]),
    ],
)
def test_the_order_of_blocks(order, pattern):
    params = parameters([torch.ones(2, 2)] * 4)
    optimizer = projected(params, density=0.5, update_gap=2, block_order=order)
    seen = []
    for _ in pattern:
        train(optimizer, [[torch.ones(2, 2)] * 4])
        seen.append("".join("1" if optimizer.state.get(p) else "0" for p in params))
    assert seen == pattern


def test_the_pointer_of_the_blocks_wraps_around():
    params = parameters([torch.ones(2)] * 5)
    optimizer = projected(params, density=0.4, update_gap=1, block_order="ascending")
    seen = []
    for _ in range(4):
        train(optimizer, [[torch.ones(2)] * 5])
        seen.append([i for i, p in enumerate(params) if optimizer.state.get(p)])
    assert seen == [[0, 1], [2, 3], [0, 4], [1, 2]]


def test_random_blocks_are_as_many_as_asked_for_and_change():
    params = parameters([torch.ones(2)] * 8)
    optimizer = projected(params, density=0.25, update_gap=1)
    seen = set()
    for _ in range(20):
        train(optimizer, [[torch.ones(2)] * 8])
        active = tuple(i for i, p in enumerate(params) if optimizer.state.get(p))
        assert len(active) == 2
        seen.add(active)
    assert len(seen) > 5


@pytest.mark.parametrize("projection", ["block", "columns", "rows", "randk"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_full_density_is_adamw(projection, decay):
    starts, gradients = random_steps([(4, 3), (3, 5)], 8)
    ours = projected(
        parameters(starts), lr=0.01, weight_decay=decay, density=1.0, update_gap=10**9, projection=projection
    )
    theirs = torch.optim.AdamW(parameters(starts), lr=0.01, weight_decay=decay)
    torch.testing.assert_close(train(ours, gradients), train(theirs, gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_no_density_is_sign_sgd(projection):
    starts, gradients = random_steps([(4, 3), (3, 5)], 5)
    optimizer = projected(
        parameters(starts),
        lr=0.01,
        weight_decay=0.1,
        density=0.0,
        update_gap=2,
        projection=projection,
        state_free_lr_scale=0.5,
        proj_lr_scale=0.4,
    )
    expected = [start.clone() for start in starts]
    for step in gradients:
        expected = [0.999 * w - 0.01 * 0.5 * 0.4 * g.sign() for w, g in zip(expected, step, strict=True)]
    torch.testing.assert_close(train(optimizer, gradients), expected, rtol=1e-12, atol=1e-12)


def test_other_parameters_get_plain_adamw():
    starts, gradients = random_steps([(4, 3), (5,), ()], 6)
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    with pytest.warns(UserWarning, match="frugal_param_groups"):
        optimizer = FRUGAL(parameters(starts), proj_lr_scale=0.1, state_free_lr_scale=0.1, **options)
    theirs = torch.optim.AdamW(parameters(starts), **options)
    torch.testing.assert_close(train(optimizer, gradients), train(theirs, gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projection", ["columns", "rows", "randk", "block"])
def test_the_first_step_after_a_redraw_is_a_full_one(projection):
    starts, gradients = random_steps([(6, 4)] * 2, 9)
    optimizer = projected(
        parameters(starts), lr=0.01, density=0.5, update_gap=4, projection=projection, state_free="none"
    )
    before = train(optimizer, gradients[:8])
    after = train(optimizer, gradients[8:])
    moved = torch.cat([(b - a).abs().flatten() for a, b in zip(before, after, strict=True)])
    torch.testing.assert_close(
        moved.sort(descending=True).values[:24], torch.full((24,), 0.01, dtype=F64), rtol=1e-6, atol=0
    )
    assert moved.count_nonzero() == 24


def test_moments_survive_a_redraw_if_they_are_not_reset():
    starts, gradients = random_steps([(6, 4)], 5)
    steps = {}
    for reset in (True, False):
        (w,) = params = parameters(starts)
        optimizer = projected(params, update_gap=2, projection="svd", reset_state=reset)
        train(optimizer, gradients)
        steps[reset] = float(optimizer.state[w]["step"])
    assert steps == {True: 1.0, False: 5.0}


@pytest.mark.parametrize(
    ("projection", "moments", "basis_bytes"),
    [
        ("columns", 2 * 10 * 3, 8 * 3),
        ("rows", 2 * 13 * 2, 8 * 2),
        ("randk", 2 * 32, 8 * 32),
        ("svd", 2 * 13 * 2, 4 * 10 * 2),
        ("random", 2 * 13 * 2, 4 * 10 * 2),
    ],
)
def test_the_size_of_a_split_state(projection, moments, basis_bytes):
    (w,) = params = parameters([torch.randn(10, 13, generator=torch.Generator().manual_seed(0))])
    optimizer = projected(params, density=0.25, projection=projection)
    train(optimizer, [[torch.ones(10, 13)]])
    state = optimizer.state[w]
    assert state["exp_avg"].numel() + state["exp_avg_sq"].numel() == moments
    assert optimizer_state_bytes(optimizer) == 4 * moments + basis_bytes + 4  # and the step count


def test_inactive_blocks_hold_no_state():
    shapes = [(10, 13), (4, 4), (3, 3), (2, 2)]
    params = parameters([torch.ones(s) for s in shapes])
    optimizer = projected(params, density=0.5, update_gap=2, block_order="ascending")
    gradients = [[torch.ones(s) for s in shapes]] * 2
    train(optimizer, gradients)
    assert optimizer_state_bytes(optimizer) == 4 * 2 * (130 + 16) + 2 * 4
    train(optimizer, gradients)
    assert optimizer_state_bytes(optimizer) == 4 * 2 * (9 + 4) + 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projection", ["svd", "random"])
@pytest.mark.parametrize("shape", [(32, 32), (8, 40), (40, 8)])
def test_the_dead_zone_keeps_round_off_out_of_the_sign(dtype, projection, shape):
    starts, gradients = random_steps([shape], 3, dtype=dtype)
    ends = {}
    for rule in ("sign", "none"):
        for dead_zone in (None, 0.0):
            options = {"lr": 0.01, "density": 1.0, "update_gap": 2, "projection": projection}
            optimizer = projected(parameters(starts), state_free=rule, dead_zone=dead_zone, **options)
            (ends[rule, dead_zone],) = train(optimizer, gradients)
    assert torch.equal(ends["sign", None], ends["none", None])
    assert (ends["sign", 0.0] - ends["none", 0.0]).abs().max() > 0.005


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
@pytest.mark.parametrize("projection", ["svd", "random"])
def test_the_update_of_the_rest_is_orthogonal_to_the_subspace(projection, shape):
    starts, gradients = random_steps([shape], 1)
    (w,) = params = parameters(starts)
    optimizer = projected(params, lr=1.0, eps=1e-15, density=0.5, projection=projection, state_free="sgd")
    (end,) = train(optimizer, gradients)
    basis = optimizer.state[w]["basis"]
    rank = round(min(shape) * 0.5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=F64))
    update, gradient = starts[0] - end, gradients[0][0]
    right = shape[0] >= shape[1]
    lifted = (update @ basis @ basis.T) if right else (basis @ basis.T @ update)
    rest = gradient - ((gradient @ basis @ basis.T) if right else (basis @ basis.T @ gradient))
    torch.testing.assert_close(update - lifted, rest, rtol=1e-9, atol=1e-12)
    direction = (update @ basis) if right else (basis.T @ update)
    torch.testing.assert_close(direction.abs(), torch.ones_like(direction), rtol=1e-6, atol=0)


def test_svd_keeps_the_leading_directions():
    (w,) = params = parameters([torch.zeros(6, 4, dtype=F64)])
    optimizer = projected(params, density=0.5, projection="svd")
    gradient = random_steps([(6, 4)], 1)[1][0][0]
    train(optimizer, [[gradient]])
    basis = optimizer.state[w]["basis"]
    kept = torch.linalg.svdvals(gradient)[:2].square().sum()
    torch.testing.assert_close((gradient @ basis).square().sum(), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_run_resumed_within_a_gap_draws_the_same_splits(projection, dtype):
    starts, gradients = random_steps([(6, 300), (300, 6), (5, 5), (4, 3)], 11, dtype=dtype)
    options = {"lr": 0.01, "update_gap": 3, "density": 0.5, "projection": projection}
    whole = train(projected(parameters(starts), **options), gradients)
    first = projected(parameters(starts), **options)
    middle = train(first, gradients[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = projected(parameters(middle), **options, generator=torch.Generator().manual_seed(99))
    second.load_state_dict(torch.load(file, weights_only=True))
    for end, expected in zip(train(second, gradients[4:]), whole, strict=True):
        assert torch.equal(end, expected)


def test_splits_come_from_the_generator_alone():
    starts, gradients = random_steps([(6, 8)] * 4, 6)

    def end(seed):
        generator = torch.Generator().manual_seed(seed)
        return train(projected(parameters(starts), update_gap=2, projection="randk", generator=generator), gradients)

    before = torch.get_rng_state()
    torch.testing.assert_close(end(1), end(1), rtol=0, atol=0)
    assert not torch.equal(end(1)[0], end(2)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_parameters_without_a_gradient_wait_for_their_first(projection):
    starts, gradients = random_steps([(6, 4), (4, 4)], 5)
    for step in gradients[:3]:
        step[0] = None
    params = parameters(starts)
    optimizer = projected(params, lr=0.01, density=0.5, update_gap=2, projection=projection, block_order="ascending")
    first, _ = train(optimizer, gradients[:3])
    assert torch.equal(first, starts[0])
    train(optimizer, gradients[3:])
    assert not torch.equal(params[0], starts[0])
    empty = projected(parameters(starts), density=0.5)
    empty.step()
    assert empty.param_groups[0]["steps"] == 0


def test_tensors_of_any_shape_can_be_blocks_and_give_entries():
    shapes = [(3, 2, 2, 2), (), (5,), (4, 4)]
    for projection in ("block", "randk"):
        starts, gradients = random_steps(shapes, 5)
        starts[0] = starts[0].to(memory_format=torch.channels_last)
        gradients = [
            [g.to(memory_format=torch.channels_last) if g.ndim == 4 else g for g in step] for step in gradients
        ]
        optimizer = projected(parameters(starts), lr=0.01, density=0.5, update_gap=2, projection=projection)
        for end, start in zip(train(optimizer, gradients), starts, strict=True):
            assert end.shape == start.shape
            assert not torch.equal(end, start)


def test_a_gradient_that_svd_cannot_take_leaves_everything_as_it_was():
    starts, gradients = random_steps([(4, 4), (4, 4)], 3)
    params = parameters(starts)
    optimizer = projected(params, update_gap=2, projection="svd")
    before = train(optimizer, gradients[:2])
    state = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in params}
    with pytest.raises(RuntimeError):
        train(optimizer, [[gradients[2][0], torch.full((4, 4), math.nan, dtype=F64)]])
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in state[p].items())


class Classifier(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 2, 3)
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "o_proj": nn.Linear(6, 6)})
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 11)
        if tied:
            self.head.weight = self.embed.weight


def names_of(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in groups if group["projectable"] for p in group["params"]]


def test_hidden_linear_weights_are_projectable_by_default():
    for model in (Classifier(), Classifier(tied=True)):
        groups = frugal_param_groups(model)
        expected = ["attn.q_proj.weight", "attn.o_proj.weight", "mlp.0.weight", "mlp.2.weight"]
        assert names_of(model, groups) == expected
        everything = [id(p) for group in groups for p in group["params"]]
        assert sorted(everything) == sorted(id(p) for p in model.parameters())
    model.mlp.requires_grad_(False)
    assert names_of(model, frugal_param_groups(model)) == ["attn.q_proj.weight", "attn.o_proj.weight"]
    assert [group["projectable"] for group in frugal_param_groups(nn.Linear(2, 2))] == [False]


def test_a_weight_shared_with_an_embedding_is_kept():
    model = Classifier()
    model.mlp[0].weight = model.embed.weight
    assert "mlp.0.weight" not in names_of(model, frugal_param_groups(model))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attn", ["attn.q_proj.weight", "attn.o_proj.weight"]),
        (["q_proj", r"mlp\.2"], ["attn.q_proj.weight", "mlp.2.weight"]),
        (nn.Conv2d, ["conv.weight"]),
        ([nn.Embedding, "head"], ["embed.weight", "head.weight"]),
    ],
)
def test_targets_are_found_by_name_and_by_type(targets, expected):
    model = Classifier()
    assert names_of(model, frugal_param_groups(model, targets)) == expected


def test_targets_that_nothing_fits_are_refused():
    for targets in ("norm", "nowhere", nn.Conv1d, []):
        with pytest.raises(ValueError, match="targets"):
            frugal_param_groups(Classifier(), targets)


def test_a_task_binds_groups_and_generator():
    (entry,) = [entry for entry in index() if entry.name == "FRUGAL"]
    setting = SimpleNamespace(model=Classifier(), generator=torch.Generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = entry.load().factory(**entry.load().bind(setting))
    assert optimizer.generator is setting.generator


@pytest.mark.parametrize(
    "arguments",
    [
        {"density": -0.1},
        {"density": 1.1},
        {"density": math.nan},
        {"update_gap": 0},
        {"projection": "diagonal"},
        {"block_order": "sideways"},
        {"state_free": "adam"},
        {"state_free_lr_scale": -1.0},
        {"proj_lr_scale": math.nan},
        {"dead_zone": -1.0},
        {"density": 0.5, "block_order": "mirror"},
    ],
)
def test_misuse_is_refused_with_the_argument_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        projected(parameters([torch.ones(2, 2)] * 2), **arguments)


@pytest.mark.parametrize("projection", ["columns", "rows", "svd", "random"])
def test_only_matrices_can_be_split(projection):
    for shape in ((), (3,), (2, 2, 2)):
        with pytest.raises(ValueError, match="params"):
            projected(parameters([torch.ones(shape)]), projection=projection)
    optimizer = projected(parameters([torch.ones(2, 2)]), projection=projection)
    with pytest.raises(ValueError, match="params"):
        optimizer.add_param_group({"params": parameters([torch.ones(3)]), "projectable": True})
    assert len(optimizer.param_groups) == 1


def test_a_state_that_does_not_fit_is_refused():
    (w,) = params = parameters([torch.ones(6, 8)])
    optimizer = projected(params, projection="columns")
    train(optimizer, [[torch.ones(6, 8)]])
    state = optimizer.state_dict()
    for other, shape, wrong in (
        ("rows", (6, 8), state),
        ("columns", (5, 8), state),
        ("columns", (6, 8), {key: value for key, value in state.items() if key != "generator"}),
    ):
        second = projected(parameters([torch.ones(shape)]), projection=other)
        with pytest.raises(ValueError, match="state_dict"):
            second.load_state_dict(wrong | {"param_groups": [{**state["param_groups"][0], "projection": other}]})
        assert not second.state
    optimizer.state[w]["basis"] += 1000
    with pytest.raises(ValueError, match="indices"):
        projected(parameters([torch.ones(6, 8)]), projection="columns").load_state_dict(optimizer.state_dict())
