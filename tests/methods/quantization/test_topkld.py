"""TopKLD, as reconstructed, and what quality against bits is fitted with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.quantization import TopKLDLoss, bit_scaling_frontier, total_compute_bits
from fairtrial.methods.quantization.topkld import most_likely

P = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.1, 0.2], dtype=torch.float64)
VARIANTS = (
    {},
    {"generalized": False},
    {"top": "forward", "rest": "reverse"},
    {"variant": "renormalised"},
    {"variant": "renormalised", "top": "forward"},
)


def scores(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    rows = student.flatten(0, -2), teacher.flatten(0, -2)
    return F.kl_div(*(row.log_softmax(-1) for row in rows), log_target=True, reduction="batchmean")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k": 0}, 0.057496),
        ({"k": 4}, 0.063522),
        ({"generalized": False}, -0.043056),
        ({"generalized": False, "top": "forward", "rest": "reverse"}, 0.164074),
        ({}, 0.056944),
        ({"top": "forward", "rest": "reverse"}, 0.064074),
        ({"variant": "renormalised", "top": "forward"}, 0.057496),
        ({"variant": "renormalised"}, 0.056984),
        ({"variant": "renormalised", "rest": "reverse"}, 0.006164 + 0.7 * 0.019620 + 0.3 * 0.144622),
    ],
)
def test_golden_values(options, expected) -> None:
    loss = TopKLDLoss(**({"k": 2} | options))(Q.log(), P.log())
    assert loss.item() == pytest.approx(expected, abs=1.1e-6)


@pytest.mark.parametrize("variant", [{}, {"generalized": False}, {"variant": "renormalised"}])
def test_the_ends_are_the_two_divergences(variant) -> None:
    student, teacher = scores(3, 5, 12, seed=0), scores(3, 5, 12, seed=1)
    torch.testing.assert_close(TopKLDLoss(0, **variant)(student, teacher), forward_kl(student, teacher))
    torch.testing.assert_close(TopKLDLoss(12, **variant)(student, teacher), forward_kl(teacher, student))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), k=st.integers(0, 9))
def test_forward_parts_add_up_to_the_forward_divergence(seed, k) -> None:
    student, teacher = scores(4, 9, seed=seed), scores(4, 9, seed=seed + 1)
    loss = TopKLDLoss(k, variant="renormalised", top="forward")(student, teacher)
    torch.testing.assert_close(loss, forward_kl(student, teacher))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), k=st.integers(0, 9), variant=st.sampled_from(VARIANTS))
def test_constants_change_nothing_and_generalised_losses_are_not_negative(seed, k, variant) -> None:
    student, teacher = scores(4, 9, seed=seed), scores(4, 9, seed=seed + 1)
    loss = TopKLDLoss(k, reduction="none", **variant)
    value = loss(student, teacher)
    assert value.shape == (4,)
    torch.testing.assert_close(loss(student + 7, teacher - 3), value)
    if variant.get("generalized", True):
        assert (value >= -1e-12).all()
    torch.testing.assert_close(TopKLDLoss(k, **variant)(student, teacher), value.mean())
    torch.testing.assert_close(TopKLDLoss(k, reduction="sum", **variant)(student, teacher), value.sum())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [0, 2, 6])
def test_gradients(variant, k) -> None:
    student, teacher = scores(3, 6, seed=0).requires_grad_(), scores(3, 6, seed=1)
    loss = TopKLDLoss(k, temperature=1.5, **variant)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), student)
    same = teacher.clone().requires_grad_()
    value = loss(same, teacher)
    (gradient,) = torch.autograd.grad(value, same)
    assert value.abs() < 1e-12
    if variant.get("generalized", True) or k in (0, 6):
        assert gradient.abs().max() < 1e-12
    else:  # the plain sum has no minimum at the teacher
        assert gradient.abs().max() > 0.01


def test_no_gradient_goes_to_the_teacher() -> None:
    student, teacher = scores(3, 6, seed=0).requires_grad_(), scores(3, 6, seed=1).requires_grad_()
    TopKLDLoss(2)(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_the_top_is_the_teachers_and_ties_go_to_the_first() -> None:
    teacher = torch.tensor([[3.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert most_likely(teacher, 2).tolist() == [
        [True, False, True, False],
        [True, True, False, False],
        [False, False, True, True],
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_have_finite_losses_and_gradients(variant, dtype) -> None:
    teacher = torch.tensor([[60.0, -60.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    student = (-teacher).requires_grad_()
    loss = TopKLDLoss(1, **variant)(student, teacher)
    assert loss.dtype == dtype
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("variant", ["split", "renormalised"])
def test_classes_that_the_teacher_excludes_count_as_those_of_probability_0(variant) -> None:
    teacher, student = scores(3, 6, seed=0), scores(3, 6, seed=1).requires_grad_()
    almost = teacher.masked_fill(~most_likely(teacher, 2), -600.0)
    cut = teacher.masked_fill(~most_likely(teacher, 2), -math.inf)
    for k in (0, 1, 2):
        loss = TopKLDLoss(k, variant=variant)(student, cut)
        torch.testing.assert_close(loss, TopKLDLoss(k, variant=variant)(student, almost))
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.isfinite().all()
    assert TopKLDLoss(3, variant=variant)(student, cut) == math.inf


def test_what_cannot_be_computed_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    for wrong in (
        {"k": -1},
        {"k": True},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"variant": "both"},
        {"top": "up"},
        {"rest": "down"},
        {"reduction": "mean"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TopKLDLoss(**({"k": 2} | wrong))
    student = scores(3, 4, seed=0)
    with pytest.raises(ValueError, match="k must be at most 4"):
        TopKLDLoss(5)(student, student)
    with pytest.raises(ValueError, match="teacher_logits"):
        TopKLDLoss(2)(student, student[:2])
    with pytest.raises(ValueError, match="student_logits must be numbers"):
        TopKLDLoss(2)(student / 0 * 0, student)
    for endless in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="teacher_logits must be finite or -inf, and not all -inf"):
            TopKLDLoss(2)(student, torch.full_like(student, endless))


def test_a_frontier_finds_the_lines_it_was_made_of() -> None:
    lines = {8.0: (2.0, -0.3), 4.0: (2.5, -0.4), 2.0: (4.5, -0.4)}
    sizes = [1e5, 3e5, 1e6]
    points = [(n, bits, math.exp(a + s * math.log(n * bits))) for bits, (a, s) in lines.items() for n in sizes]
    frontier = bit_scaling_frontier(*zip(*points, strict=True))
    assert {bits: tuple(fit) for bits, fit in frontier.fits.items()} == {
        bits: pytest.approx(line) for bits, line in lines.items()
    }
    crossing = math.exp(0.5 / 0.1)  # 2 - 0.3 x = 2.5 - 0.4 x
    assert frontier.dominating(0.9 * crossing) == 8
    assert frontier.dominating(1.1 * crossing) == 4
    assert frontier.fits[4.0](1e6) == pytest.approx(math.exp(2.5 - 0.4 * math.log(1e6)))
    with pytest.raises(ValueError, match="at least two sizes at 4 bits"):
        bit_scaling_frontier([1e5, 1e5], [4.0, 4.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="quality"):
        bit_scaling_frontier([1e5, 2e5], [4.0, 4.0], [1.0, math.nan])
    with pytest.raises(ValueError, match="bits"):
        bit_scaling_frontier([1e5, 2e5], [4.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="total_bits"):
        frontier.dominating(0.0)


def test_bits_of_compute() -> None:
    assert total_compute_bits([10.0, 5.0], [4.0, 8.0], [8.0, 8.0]) == 10 * 32 + 5 * 64
    assert total_compute_bits([10.0, 5.0], [4.0, 8.0], [8.0, 4.0], compute="max") == 15 * 8
    with pytest.raises(ValueError, match="weight_bits"):
        total_compute_bits([10.0], [4.0, 8.0], [8.0])
    with pytest.raises(ValueError, match="macs"):
        total_compute_bits([-1.0], [4.0], [8.0])
