import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch.nn import functional as F

from fairtrial.methods.losses import AnyLoss
from fairtrial.methods.losses.anyloss import METRICS, strongest_rivals

P = torch.tensor([0.9, 0.6, 0.4, 0.2, 0.55, 0.05], dtype=torch.float64)
Y = torch.tensor([1, 1, 1, 0, 0, 0])


def of_probabilities(metric="f1", **options):
    return AnyLoss(metric, from_logits=False, **options)


def random_batch(seed, n=12):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    return logits, torch.arange(n) % 3 // 2


def random_scores(seed, n=12, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=generator, dtype=torch.float64), torch.arange(n) % classes


@pytest.mark.parametrize(
    ("metric", "beta", "expected"),
    [
        ("accuracy", 1.0, 0.329111),
        ("f1", 1.0, 0.330507),
        ("fbeta", 1.0, 0.330507),
        ("fbeta", 0.5, 0.328799),
        ("fbeta", 2.0, 0.332206),
        ("gmean", 1.0, 0.329125),
        ("balanced_accuracy", 1.0, 0.329111),
        ("mcc", 1.0, 0.658210),
    ],
)
def test_golden_values(metric, beta, expected):
    exact = of_probabilities(metric, beta=beta, eps=0.0)(P, Y).item()
    assert exact == pytest.approx(expected, abs=1e-6)
    assert of_probabilities(metric, beta=beta)(P, Y).item() == pytest.approx(exact, abs=1e-7)


def test_the_soft_counts():
    seen = []

    def precision(tp, fn, fp, tn):
        seen.append([count.item() for count in (tp, fn, fp, tn)])
        return tp / (tp + fp)

    loss = of_probabilities(precision)
    assert loss(P, Y).item() == pytest.approx(1 - 2.0 / 2.974667, abs=1e-6)
    assert seen[0] == pytest.approx([2.0, 1.0, 0.974667, 2.025333], abs=1e-6)
    assert "metric='precision'" in repr(loss)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("f1", [0, -0.010967, -0.010967, 0, 0.201973, 0]),
        ("accuracy", [0, -0.008208, -0.008208, 0, 0.300407, 0]),
    ],
)
def test_golden_gradients(metric, expected):
    p = P.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of_probabilities(metric, eps=0.0)(p, Y), p)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_logits_and_probabilities_agree_and_targets_may_be_of_any_type():
    logits, y = random_batch(0)
    for metric in METRICS:
        value = AnyLoss(metric)(logits, y)
        torch.testing.assert_close(of_probabilities(metric)(logits.sigmoid(), y), value)
        for dtype in (torch.bool, torch.int8, torch.float32):
            assert torch.equal(AnyLoss(metric)(logits, y.to(dtype)), value)


HARD = {
    "f1": metrics.f1_score,
    "accuracy": metrics.accuracy_score,
    "gmean": lambda y, decided: math.sqrt(
        metrics.recall_score(y, decided) * metrics.recall_score(y, decided, pos_label=0)
    ),
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "mcc": metrics.matthews_corrcoef,
    "precision": metrics.precision_score,
    "recall": metrics.recall_score,
    "fbeta": lambda y, decided: metrics.fbeta_score(y, decided, beta=1.0),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_amplified_without_end_it_is_the_metric_of_the_decisions(metric, threshold):
    y = Y.repeat(5)
    p = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = torch.where((p - threshold).abs() > 0.01, p, threshold + 0.02)
    loss = of_probabilities(metric, amplification=1e5, threshold=threshold, eps=0.0)(p, y)
    assert loss.item() == pytest.approx(1 - HARD[metric](y, p > threshold), abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_with_classes_amplified_without_end_it_is_the_mean_metric_of_one_against_the_rest(metric):
    scores, y = random_scores(2, 40)
    loss = AnyLoss(metric, amplification=1e7, eps=0.0)(scores, y)
    decided = scores.argmax(1)
    expected = sum(HARD[metric](y == k, decided == k) for k in range(4)) / 4
    assert loss.item() == pytest.approx(1 - expected, abs=1e-9)


def test_without_amplification_every_decision_is_half():
    loss = of_probabilities("accuracy", amplification=1e-9)(P, Y)
    assert loss.item() == pytest.approx(0.5, abs=1e-9)


def test_beta_from_precision_to_recall():
    precise, complete = (of_probabilities(name, eps=0.0)(P, Y).item() for name in ("precision", "recall"))
    assert of_probabilities("fbeta", beta=0.0, eps=0.0)(P, Y).item() == pytest.approx(precise)
    assert of_probabilities("fbeta", beta=1e4, eps=0.0)(P, Y).item() == pytest.approx(complete, abs=1e-6)


def test_on_balanced_classes_accuracy_is_balanced_accuracy():
    balanced = of_probabilities("balanced_accuracy", eps=0.0)(P, Y)
    torch.testing.assert_close(of_probabilities("accuracy", eps=0.0)(P, Y), balanced)


@pytest.mark.parametrize("metric", METRICS)
def test_first_and_second_derivatives(metric):
    loss = AnyLoss(metric, amplification=5.0)
    logits, y = random_batch(3)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), logits.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z: loss(z, y), logits)
    scores, y = random_scores(3, 6)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), scores.requires_grad_())
    probabilities = scores.detach().softmax(1).requires_grad_()
    given = AnyLoss(metric, amplification=5.0, from_logits=False)
    assert torch.autograd.gradcheck(lambda p: given(p, y), (0.99 * probabilities).detach().requires_grad_())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), metric=st.sampled_from(METRICS), order=st.permutations(range(12)))
def test_order_and_repetition_of_the_batch_do_not_matter(seed, metric, order):
    loss = AnyLoss(metric, eps=0.0)
    for values, y in (random_batch(seed), random_scores(seed)):
        value = loss(values, y)
        torch.testing.assert_close(loss(values[order], y[order]), value)
        if metric != "mcc":
            torch.testing.assert_close(loss(torch.cat([values, values]), torch.cat([y, y])), value)


def test_two_classes_are_the_binary_loss_of_either():
    scores, y = random_scores(4, classes=2)
    logits = scores[:, 1] - scores[:, 0]
    for metric in METRICS:
        loss = AnyLoss(metric, amplification=10.0)
        either = 0.5 * (loss(logits, y) + loss(-logits, 1 - y))
        torch.testing.assert_close(loss(scores, y), either)
        given = AnyLoss(metric, amplification=10.0, from_logits=False)
        torch.testing.assert_close(given(scores.softmax(1), y), either)


def test_rivals_are_the_highest_scores_of_the_others():
    scores = torch.tensor([[1.0, 3, 2], [4, 4, 0]])
    assert strongest_rivals(scores).tolist() == [[3, 2, 3], [4, 4, 4]]


def test_alike_scores_are_where_classes_learn():
    scores = torch.zeros(8, 10, requires_grad=True)
    y = torch.arange(8)
    AnyLoss()(scores + 1e-3 * F.one_hot(y, 10), y).backward()
    assert scores.grad.abs().amax() > 0.01


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("present", [0, 1])
def test_with_one_class_only_the_missing_ones_terms_are_constant(metric, present):
    logits = torch.tensor([0.05, -0.02, 0.01], requires_grad=True)
    loss = AnyLoss(metric)(logits, torch.full((3,), present))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    silent = {0: {"f1", "fbeta", "precision", "recall", "gmean", "mcc"}, 1: {"gmean", "mcc"}}[present]
    assert bool((gradient == 0).all()) == (metric in silent)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_confident_batches_are_finite(metric, dtype):
    y = torch.tensor([0, 1, 1])
    for logits in (torch.tensor([1e4, -1e4, -1e4]), torch.tensor([-1e4, 1e4, 1e4]), torch.full((3,), -1e4)):
        leaf = logits.to(dtype).requires_grad_()
        loss = AnyLoss(metric)(leaf, y)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.dtype == dtype
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_compiled_whole_the_binary_loss_is_the_same(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    logits, y = random_batch(5)
    torch.compiler.reset()
    compiled = torch.compile(AnyLoss("mcc"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, y), AnyLoss("mcc")(logits, y))


def test_misuse_is_refused_with_the_argument_named():
    nan = float("nan")
    for arguments in (
        {"metric": "auc"},
        {"beta": -1.0},
        {"beta": nan},
        {"amplification": 0.0},
        {"amplification": nan},
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"threshold": nan},
        {"eps": -1.0},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            AnyLoss(**arguments)
    for values in ([0.5, 1.1], [-0.1, 0.5], [0.5, nan]):
        with pytest.raises(ValueError, match=r"^input must be probabilities within 0\.\.1"):
            of_probabilities()(torch.tensor(values), torch.tensor([0, 1]))
    for target in (torch.tensor([0, 2]), torch.tensor([-1, 1]), torch.tensor([0.0, nan]), torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match="^target must be 0 or 1 everywhere"):
            AnyLoss()(torch.zeros(2), target)


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    for input, target in (
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(3), torch.zeros(2)),
        (torch.zeros(3), torch.zeros(3, 1)),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)),
        (torch.tensor(0.0), torch.tensor(1)),
        (torch.zeros(3, dtype=torch.long), torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="^input must be"):
            AnyLoss()(input, target)
