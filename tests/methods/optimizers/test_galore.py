import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import GaLoreAdamW, GaLoreProjector, galore_param_groups, optimizer_state_bytes
from fairtrial.methods.optimizers.gradient_projection import low_rank_shape, sides_of

F64 = torch.float64
W = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 1], [2, 0, 2, 0]], dtype=F64)
G1 = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 4, 1]], dtype=F64)
G2 = torch.tensor([[0.0, 1, 0, 1], [1, 0, 2, 0], [0.5, 0, 1, 0]], dtype=F64)
TYPES = ("std", "reverse_std", "left", "right", "full")


def random(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def after(start, gradients, **options):
    """The weights after each step along given gradients, and the optimizer."""
    w = nn.Parameter(start.clone())
    optimizer = GaLoreAdamW([w], **{"rank": 1, "lr": 0.1, **options})
    path = []
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        path.append(w.detach().clone())
    return path, optimizer


RANK_1 = {
    1: [[1, 2, 3, 4], [0, 1, 0, 1], [2, 0, 1.975000, -0.024999]],
    2: [[1, 2, 3, 4], [0, 1, 0, 1], [1.981398, 0, 1.954235, -0.041750]],
    3: [[1, 2, 3, 4], [-0.018289, 1, -0.019432, 0.988418], [1.972253, 0, 1.944519, -0.047541]],
}
RANK_2 = {
    1: [[1, 2, 3, 4], [0, 0.975, 0, 1], [2, 0, 1.975, -0.024999]],
    3: [
        [0.985620, 1.981273, 2.985620, 3.984030],
        [-0.036892, 0.958249, -0.038035, 0.988418],
        [1.972253, 0, 1.944519, -0.047541],
    ],
}


@pytest.mark.parametrize(
    ("rank", "step", "expected"),
    [(rank, step, w) for rank, path in ((1, RANK_1), (2, RANK_2)) for step, w in path.items()],
)
def test_golden_steps(rank, step, expected):
    for fix_signs in (True, False) if step < 3 else (True,):  # of a second subspace the signs matter
        path, _ = after(W, [G1, G2, G2], rank=rank, update_proj_gap=2, fix_signs=fix_signs)
        torch.testing.assert_close(path[step - 1], torch.tensor(expected, dtype=F64), atol=2e-6, rtol=0)


def test_signs_are_those_of_the_largest_entries():
    _, optimizer = after(W, [G1], rank=2, update_proj_gap=1, fix_signs=True)
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["left"].T, torch.tensor([[0, 0, 1], [0, 1, 0]], dtype=F64))
    _, optimizer = after(W, [G1, G2], rank=2, update_proj_gap=1, fix_signs=True)
    (state,) = optimizer.state.values()
    expected = torch.tensor([[0, 0.894427, 0.447214], [1, 0, 0]], dtype=F64)
    torch.testing.assert_close(state["left"].T, expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), proj_type=st.sampled_from(TYPES), shape=st.sampled_from([(7, 4), (4, 7), (5, 5)]))
def test_the_projection_is_that_on_the_leading_subspace(seed, proj_type, shape):
    gradient = random(*shape, seed=seed)
    projector = GaLoreProjector(2, proj_type=proj_type)
    low_rank = projector.project(gradient, 0)
    group = {"rank": 2, "proj_type": proj_type}
    assert tuple(low_rank.shape) == low_rank_shape(shape, group)
    back = projector.project_back(low_rank)
    P, Q = (projector.bases.get(side) for side in ("left", "right"))
    expected = gradient if P is None else P @ P.T @ gradient
    expected = expected if Q is None else expected @ Q.T @ Q
    torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projector.project_back(projector.project(back, 1)), back, rtol=1e-12, atol=1e-12)
    U, S, Vh = torch.linalg.svd(gradient)  # on either side, the best approximation of rank 2
    torch.testing.assert_close(back, U[:, :2] @ S[:2].diag() @ Vh[:2], rtol=1e-10, atol=1e-10)


def test_a_projector_has_a_scale_and_renews_its_subspace_every_gap():
    projector, gradients = GaLoreProjector(1, update_proj_gap=3, scale=0.5), [random(3, 4, seed=i) for i in range(4)]
    bases = []
    for step, gradient in enumerate(gradients):
        low_rank = projector.project(gradient, step)
        bases.append(projector.bases["left"])
    assert bases[0] is bases[1] is bases[2] is not bases[3]
    torch.testing.assert_close(projector.project_back(low_rank), 0.5 * bases[3] @ low_rank)
    with pytest.raises(ValueError, match="low_rank"):
        GaLoreProjector(1).project_back(low_rank)


@pytest.mark.parametrize(
    ("proj_type", "tall", "wide"),
    [
        ("std", ("right",), ("left",)),
        ("reverse_std", ("left",), ("right",)),
        ("left", ("left",), ("left",)),
        ("right", ("right",), ("right",)),
        ("full", ("left", "right"), ("left", "right")),
    ],
)
def test_the_sides(proj_type, tall, wide):
    assert sides_of((4, 3), proj_type) == sides_of((3, 3), proj_type) == tall or proj_type == "std"
    assert (sides_of((4, 3), proj_type), sides_of((3, 4), proj_type)) == (tall, wide)


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_updates_of_one_subspace_have_its_rank_and_of_several_at_most_their_sum(proj_type, shape):
    gradients = [random(*shape, seed=i) for i in range(6)]
    start = random(*shape, seed=9)
    path, _ = after(start, gradients, rank=1, update_proj_gap=3, proj_type=proj_type)
    assert torch.linalg.matrix_rank(path[2] - start, atol=1e-9) == 1
    assert torch.linalg.matrix_rank(path[5] - start, atol=1e-9) == 2


def test_a_rank_may_exceed_the_shorter_side_where_the_longer_is_compressed():
    # the authors' code multiplies on the wrong side here
    path, _ = after(random(3, 8), [random(3, 8, seed=1)] * 3, rank=3, proj_type="reverse_std")
    assert path[-1].shape == (3, 8)


def test_the_first_update_does_not_depend_on_signs(monkeypatch):
    start, gradient = random(5, 8, seed=1), random(5, 8, seed=2)
    (plain,), _ = after(start, [gradient], rank=3)
    svd = torch.linalg.svd

    def flipped(matrix, full_matrices):
        U, S, Vh = svd(matrix, full_matrices=full_matrices)
        signs = torch.tensor([-1.0, 1, -1, 1, -1], dtype=F64)
        return U * signs, S, Vh * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    (other,), _ = after(start, [gradient], rank=3)
    torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)


def test_of_diagonal_gradients_full_rank_leaves_adamw():
    gradients = [torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=F64) * (1 + i)) for i in range(4)]
    start = random(3, 3, seed=5)
    projected, _ = after(start, gradients, rank=3, update_proj_gap=10**6, scale=1.0)
    with pytest.warns(UserWarning, match="no parameter group has a rank"):
        plain, _ = after(start, gradients, rank=None)
    torch.testing.assert_close(projected, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-12, 1e-9])
def test_without_a_rank_it_is_adamw_up_to_where_eps_is_added(eps):
    gradients = [random(4, 5, seed=i) for i in range(6)]
    with pytest.warns(UserWarning, match="no parameter group has a rank"):
        ours, _ = after(W[:, :1] @ W[:1], [g[:3, :4] for g in gradients], rank=None, lr=0.01, eps=eps)
    w = nn.Parameter(W[:, :1] @ W[:1])
    theirs = torch.optim.AdamW([w], lr=0.01, eps=eps, weight_decay=0.0)
    for gradient in gradients:
        w.grad = gradient[:3, :4].clone()
        theirs.step()
    torch.testing.assert_close(ours[-1], w.detach(), rtol=1e-6, atol=1e-7)


def test_the_decay_comes_after_the_step_and_is_not_scaled():
    (plain,), _ = after(W, [G1], scale=0.25)
    (decayed,), _ = after(W, [G1], scale=0.25, weight_decay=0.5)
    torch.testing.assert_close(decayed, plain * (1 - 0.1 * 0.5), rtol=1e-12, atol=0)


def test_without_bias_correction_the_first_step_is_smaller_by_its_factor():
    (corrected,), _ = after(W, [G1])
    (plain,), _ = after(W, [G1], correct_bias=False)
    torch.testing.assert_close((plain - W) * math.sqrt(0.001) / 0.1, corrected - W, rtol=1e-9, atol=1e-12)


def test_moments_are_kept_when_the_subspace_changes():
    _, optimizer = after(W, [G1, G1, G2], update_proj_gap=2)
    (state,) = optimizer.state.values()
    assert state["step"] == 3
    low_rank = state["left"].T @ G2
    (before,) = after(W, [G1, G1], update_proj_gap=2)[1].state.values()
    torch.testing.assert_close(state["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * low_rank)


@pytest.mark.parametrize(("rank", "kept"), [(64, 64), (0.125, 64), (0.001, 1)])
def test_the_state_has_the_size_of_the_formula(rank, kept):
    p = nn.Parameter(torch.zeros(512, 512))
    optimizer = GaLoreAdamW([p], rank=rank)
    p.grad = random(512, 512, dtype=torch.float32)
    optimizer.step()
    numbers = 2 * kept * 512 + kept * 512
    assert optimizer_state_bytes(optimizer) == 4 * numbers + 4  # and the step count
    if kept == 64:
        assert numbers == 0.1875 * 2 * 512**2


@pytest.mark.parametrize("proj_type", TYPES)
def test_the_subspace_is_saved_and_renewed_in_step(proj_type):
    gradients = [random(4, 6, seed=i, dtype=torch.bfloat16) for i in range(7)]
    start = random(4, 6, seed=8, dtype=torch.bfloat16)
    options = {"rank": 2, "update_proj_gap": 3, "proj_type": proj_type}
    whole, _ = after(start, gradients, **options)
    path, optimizer = after(start, gradients[:4], **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    w = nn.Parameter(path[-1].clone())
    resumed = GaLoreAdamW([w], lr=0.1, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for gradient in gradients[4:]:
        w.grad = gradient.clone()
        resumed.step()
    assert torch.equal(w.detach(), whole[-1])


def test_a_gradient_that_is_not_finite_is_left_out_where_a_subspace_is_due():
    bad = G1.clone()
    bad[0, 0] = math.nan
    path, optimizer = after(W, [bad, G1, G2, bad, G2], update_proj_gap=2, fix_signs=True)
    clean, reference = after(W, [G1, G2, G2], update_proj_gap=2, fix_signs=True)
    assert torch.equal(path[0], W)
    assert torch.equal(path[2], path[3])
    assert torch.equal(path[4], clean[-1])
    assert [int(state["step"]) for state in optimizer.state.values()] == [3]
    assert len(reference.state) == 1


def test_one_optimizer_for_each_parameter_in_a_hook_gives_the_same():
    def model():
        return nn.Sequential(nn.Linear(6, 5, dtype=F64), nn.Tanh(), nn.Linear(5, 6, dtype=F64))

    models = model(), model()
    models[1].load_state_dict(models[0].state_dict())
    joint = GaLoreAdamW(galore_param_groups(models[0], rank=2))
    apart = {
        p: GaLoreAdamW([{**group, "params": [p]}])
        for group in galore_param_groups(models[1], rank=2)
        if group["rank"]
        for p in group["params"]
    }
    with pytest.warns(UserWarning, match="no parameter group has a rank"):
        apart |= {p: GaLoreAdamW([p]) for p in models[1].parameters() if p not in apart}

    def update(p):
        apart[p].step()
        p.grad = None

    for p in models[1].parameters():
        p.register_post_accumulate_grad_hook(update)
    for i in range(4):
        x = random(8, 6, seed=i)
        joint.zero_grad()
        for m in models:
            (m(x) - x).square().mean().backward()
        joint.step()
    assert all(p.grad is None for p in models[1].parameters())
    torch.testing.assert_close(dict(models[0].state_dict()), dict(models[1].state_dict()), rtol=1e-12, atol=0)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        layer = {
            "self_attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False), "o_proj": nn.Linear(8, 8, bias=False)}),
            "mlp": nn.ModuleDict({"up_proj": nn.Linear(8, 12, bias=False), "down_proj": nn.Linear(12, 8, bias=False)}),
            "norm": nn.LayerNorm(8),
        }
        self.layers = nn.ModuleList([nn.ModuleDict(layer)])
        self.lm_head = nn.Linear(8, 11, bias=False)


def test_groups_are_the_linear_layers_but_the_last():
    model = Llama()
    others, projected = galore_param_groups(model, rank=4)
    assert (others["rank"], projected["rank"]) == (None, 4)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)].split(".")[-2] for p in projected["params"]] == ["q_proj", "o_proj", "up_proj", "down_proj"]
    assert len(others["params"]) == 4
    (_, authors) = galore_param_groups(model, 4, ("attn", "mlp"))
    assert [id(p) for p in authors["params"]] == [id(p) for p in projected["params"]]
    assert "rank" not in galore_param_groups(model)[1]
    with pytest.raises(ValueError, match="targets"):
        galore_param_groups(model, 4, "conv")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rank", value) for value in (0, -1, 1.5, 0.0, math.nan, True)),
        ("update_proj_gap", 0),
        *(("scale", value) for value in (0.0, -1.0, math.nan, math.inf)),
        ("proj_type", "both"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(name, value):
    with pytest.raises(ValueError, match=name):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "rank": 1, name: value}])
    with pytest.raises(ValueError, match=name):
        GaLoreProjector(**{"rank": 1, name: value})


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_only_matrices_are_projected(shape):
    optimizer = GaLoreAdamW([nn.Parameter(torch.ones(2, 2))], rank=1)
    with pytest.raises(ValueError, match="params"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(shape))], "rank": 1})
    assert len(optimizer.param_groups) == 1


def test_a_rank_above_the_shorter_side_is_cut_down_with_one_warning():
    with pytest.warns(UserWarning, match="rank 9 exceeds") as warnings:
        path, optimizer = after(W, [G1], rank=9)
    assert len(warnings) == 1
    (state,) = optimizer.state.values()
    assert state["left"].shape == (3, 3)
    assert torch.equal(path[0], after(W, [G1], rank=3)[0][0])
