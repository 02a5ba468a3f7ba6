from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from fairtrial.methods.data import DecoupledMixup, DecoupledMixupLoss, Mixup, TwoHotMixupBCELoss
from fairtrial.methods.registry import index

LOGITS = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [1.5, -0.5, 0.2, 0.4]], dtype=torch.float64)
A, B, LAM = torch.tensor([0, 1, 2]), torch.tensor([1, 3, 2]), 0.7
FORMS = [("both", 1.0), ("both", 0.5), ("both", 0.0), ("more", 0.5), ("less", 2.0)]  # mode and xi


def random_batch(seed, n=6, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    a, b = torch.randint(classes, (2, n), generator=generator)
    return logits, a, b, torch.rand(n, generator=generator, dtype=torch.float64)


def soft_labels(a, b, lam, classes):
    lam = torch.as_tensor(lam, dtype=torch.float64).expand(a.shape)[:, None]
    return lam * F.one_hot(a, classes) + (1 - lam) * F.one_hot(b, classes)


def test_mixup_cross_entropy_golden_values():
    loss = DecoupledMixupLoss(0.0, reduction="none")(LOGITS, A, B, LAM)
    expected = torch.tensor([0.792350, 1.206053, 1.854309], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS, soft_labels(A, B, LAM, 4), reduction="none"))


def test_decoupled_term_golden_values():
    difference = DecoupledMixupLoss(0.1, reduction="none")(LOGITS, A, B, LAM)
    difference = difference - DecoupledMixupLoss(0.0, reduction="none")(LOGITS, A, B, LAM)
    expected = torch.tensor([0.030013, 0.092220, 0.0], dtype=torch.float64)
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=0)
    assert DecoupledMixupLoss()(LOGITS, A, B, LAM).item() == pytest.approx(1.324982, abs=1e-6)


@pytest.mark.parametrize(
    ("eta", "mode", "xi", "expected"),
    [
        (0.1, "more", 1.0, [0.804239, 1.244802, 1.854309]),
        (0.1, "less", 1.0, [0.810474, 1.259523, 1.854309]),
        (0.01, "more", 0.5, [0.793771, 1.210684, 1.854309]),
    ],
)
def test_golden_values_of_other_weights(eta, mode, xi, expected):
    loss = DecoupledMixupLoss(eta, mode=mode, xi=xi, reduction="none")(LOGITS, A, B, LAM)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("threshold", "power", "expected"),
    [(1.0, 1.0, 0.639353), (0.5, 1.0, 0.451853), (0.5, 2.0, 0.481853), (1.0, 0.0, 0.401853)],
)
def test_two_hot_golden_values(threshold, power, expected):
    loss = TwoHotMixupBCELoss(threshold, power)(LOGITS[:1], A[:1], B[:1], LAM)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_weights_belong_to_classes_whatever_the_order_of_their_indices():
    loss = DecoupledMixupLoss(0.1)(LOGITS[1:2], torch.tensor([3]), torch.tensor([1]), LAM)
    assert loss.item() == pytest.approx(2.107424, abs=1e-6)


def test_each_part_competes_with_the_unmixed_classes_only():
    logits, a, b = LOGITS[:2].clone().requires_grad_(), A[:2], B[:2]
    for mode, i, j in (("more", a, b), ("less", b, a)):
        loss = DecoupledMixupLoss(1.0, mode=mode, xi=0.0, reduction="sum")(logits, a, b, LAM)
        plain = DecoupledMixupLoss(0.0, mode=mode, reduction="sum")(logits, a, b, LAM)
        (gradient,) = torch.autograd.grad(loss - plain, logits)
        phi = logits.detach().scatter(1, j[:, None], -torch.inf).softmax(1)
        torch.testing.assert_close(gradient, phi - F.one_hot(i, 4))
        assert (gradient.gather(1, j[:, None]) == 0).all()
        torch.testing.assert_close((loss - plain).detach(), -phi.gather(1, i[:, None]).log().sum())


def test_an_unmixed_share_has_no_weight_and_stays_out_of_the_denominator():
    phi = LOGITS[:1, [0, 2, 3]].softmax(1)[:, 0]
    for xi in (1.0, 0.0):
        loss = DecoupledMixupLoss(0.1, xi=xi)(LOGITS[:1], A[:1], B[:1], 1.0)
        expected = F.cross_entropy(LOGITS[:1], A[:1]) - 0.1 * phi.log()[0]
        torch.testing.assert_close(loss, expected)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), form=st.sampled_from(FORMS), shift=st.floats(-50, 50))
def test_shift_and_the_order_of_the_pair_do_not_matter(seed, form, shift):
    logits, a, b, lam = random_batch(seed)
    loss = DecoupledMixupLoss(0.5, mode=form[0], xi=form[1], reduction="none")
    value = loss(logits, a, b, lam)
    torch.testing.assert_close(loss(logits + shift, a, b, lam), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(logits, b, a, 1.0 - lam), value)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), form=st.sampled_from(FORMS))
def test_soft_labels_say_the_same_as_the_pair(seed, form):
    logits, a, b, lam = random_batch(seed)
    target = soft_labels(a, b, lam, 5)
    for loss in (
        DecoupledMixupLoss(0.5, mode=form[0], xi=form[1], reduction="none"),
        TwoHotMixupBCELoss(0.6, form[1], reduction="none"),
    ):
        torch.testing.assert_close(loss(logits, target), loss(logits, a, b, lam))
        torch.testing.assert_close(loss(logits, a, b, lam)[:1], loss(logits[:1], a[:1], b[:1], float(lam[0])))


def test_the_even_mix_gets_the_regulariser_too():
    loss = DecoupledMixupLoss(0.1, reduction="none")
    near = loss(LOGITS, A, B, 0.5 + 1e-9)
    torch.testing.assert_close(loss(LOGITS, A, B, 0.5), near)
    more, less = (DecoupledMixupLoss(0.1, mode=m)(LOGITS, A, B, 0.5) for m in ("more", "less"))
    torch.testing.assert_close(more, DecoupledMixupLoss(0.1, mode="more")(LOGITS, A, B, 0.5 + 1e-9))
    torch.testing.assert_close(less, DecoupledMixupLoss(0.1, mode="less")(LOGITS, A, B, 0.5 + 1e-9))


@pytest.mark.parametrize("loss", [DecoupledMixupLoss(0.5), TwoHotMixupBCELoss(0.5)])
def test_one_hot_labels_give_the_plain_loss(loss):
    hot = F.one_hot(A, 4).double()
    if isinstance(loss, DecoupledMixupLoss):
        plain = F.cross_entropy(LOGITS, A)
    else:
        plain = F.binary_cross_entropy_with_logits(LOGITS, hot)
    torch.testing.assert_close(loss(LOGITS, hot), plain)
    torch.testing.assert_close(loss(LOGITS, A, A, 0.6), plain)


def test_two_hot_targets():
    logits, a, b, lam = random_batch(5)
    shares = TwoHotMixupBCELoss()(logits, a, b, lam)
    torch.testing.assert_close(shares, F.binary_cross_entropy_with_logits(logits, soft_labels(a, b, lam, 5)))
    nothing_of_b = TwoHotMixupBCELoss(1.0, 0.0)(LOGITS, A, B, 1.0)
    torch.testing.assert_close(nothing_of_b, F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(A, 4).double()))
    same_class = TwoHotMixupBCELoss(1.0, 2.0)(LOGITS[2:], A[2:], B[2:], LAM)
    target = (0.7**2 + 0.3**2) * F.one_hot(A[2:], 4).double()
    torch.testing.assert_close(same_class, F.binary_cross_entropy_with_logits(LOGITS[2:], target))


@pytest.mark.parametrize("loss", [DecoupledMixupLoss(0.5, xi=0.5), TwoHotMixupBCELoss(0.5)])
def test_derivatives_dtypes_reductions_and_large_logits(loss, monkeypatch):
    logits, a, b, lam = random_batch(6, n=3)
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, a, b, lam), leaf)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, a, b, lam), leaf)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        value = loss(logits.to(dtype), soft_labels(a, b, lam, 5).to(dtype))
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), loss(logits, a, b, lam), rtol=0.03, atol=0.0)
    large = (1e4 * logits.sign()).requires_grad_()
    loss(large, a, b, lam).backward()
    assert large.grad.isfinite().all()
    single = type(loss)(reduction="none")(logits, a, b, lam)
    torch.testing.assert_close(type(loss)(reduction="sum")(logits, a, b, lam), single.sum())
    torch.testing.assert_close(type(loss)()(logits, a, b, lam), single.mean())
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, a, b, lam), loss(logits, a, b, lam))
    torch.testing.assert_close(compiled(logits, soft_labels(a, b, lam, 5)), loss(logits, a, b, lam))


def test_inputs_and_labels_are_mixed_alike():
    y = torch.arange(40) % 5
    x = F.one_hot(y, 5).double()
    mixed, labels = Mixup(5, 0.8)(x, y, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed, labels)
    assert torch.equal(x, F.one_hot(y, 5).double())
    assert torch.equal(y, torch.arange(40) % 5)
    torch.testing.assert_close(labels.sum(1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(labels.sum(0), torch.full((5,), 8.0, dtype=torch.float64))
    assert ((labels > 0).sum(1) == 2).any()
    images, labels = Mixup(5)(torch.rand(4, 3, 8, 8), y[:4], torch.Generator().manual_seed(0))
    assert images.shape == (4, 3, 8, 8)
    assert F.cross_entropy(torch.zeros(4, 5), labels).item() == pytest.approx(1.609438, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_the_share_is_beta_distributed(alpha):
    generator = torch.Generator().manual_seed(0)
    mixup = Mixup(2, alpha)
    x, y = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    shares, kept = [], 0
    for _ in range(1000):
        mixed, _ = mixup(x, y, generator)
        kept += bool(torch.equal(mixed, x))
        shares.append(mixed[1].item())
    swapped = [share for share in shares if share != 1.0]  # the identity, half of all permutations, shows no share
    assert abs(kept - 500) < 75
    assert stats.kstest(swapped, "beta", args=(alpha, alpha)).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1e-3, 1e5])
def test_extreme_shares_stay_shares(alpha):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        _, labels = DecoupledMixup(3, alpha)(torch.rand(6, 2), torch.arange(6) % 3, generator)
        assert ((labels >= 0) & (labels <= 1)).all()
        torch.testing.assert_close(labels.sum(1), torch.ones(6))


def test_only_the_generator_decides_and_alpha_does_not_change_the_permutation():
    x, y = torch.rand(32, 3, dtype=torch.float64), torch.arange(32)
    before = torch.get_rng_state()
    first, again = (Mixup(32)(x, y, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    _, other = Mixup(32, 4.0)(x, y, torch.Generator().manual_seed(7))
    assert torch.equal(other > 0, first[1] > 0)
    assert not torch.equal(other, first[1])


def test_the_registered_transform_brings_its_criterion():
    (entry,) = [entry for entry in index() if entry.paper == "decoupled_mixup"]
    found = entry.load()
    assert (found.slot, set(found.search)) == ("batch", {"alpha", "eta"})
    transform = found.factory(**found.bind(SimpleNamespace(num_classes=5)), alpha=0.4, eta=0.3)
    y = torch.arange(20) % 5
    x = torch.rand(20, 4)
    mixed, labels = transform(x, y, torch.Generator().manual_seed(1))
    plain, same_labels = Mixup(5, 0.4)(x, y, torch.Generator().manual_seed(1))
    assert torch.equal(mixed, plain)
    assert torch.equal(labels, same_labels)
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = transform.criterion(logits, labels)
    torch.testing.assert_close(loss, DecoupledMixupLoss(0.3)(logits, labels))
    assert loss > F.cross_entropy(logits, labels)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert repr(transform) == (
        "DecoupledMixup(num_classes=5, alpha=0.4, eta=0.3, mode='both', xi=1.0, reduction='mean')"
    )


def test_misuse_is_refused_with_the_argument_named():
    nan = float("nan")
    for make, arguments in [
        (DecoupledMixupLoss, {"eta": -0.1}),
        (DecoupledMixupLoss, {"eta": nan}),
        (DecoupledMixupLoss, {"mode": "most"}),
        (DecoupledMixupLoss, {"xi": -1.0}),
        (DecoupledMixupLoss, {"reduction": "avg"}),
        (TwoHotMixupBCELoss, {"threshold": 0.0}),
        (TwoHotMixupBCELoss, {"threshold": 1.1}),
        (TwoHotMixupBCELoss, {"power": nan}),
        (TwoHotMixupBCELoss, {"reduction": "avg"}),
        (Mixup, {"num_classes": 1}),
        (Mixup, {"num_classes": 3, "alpha": 0.0}),
        (DecoupledMixup, {"num_classes": 2}),
        (DecoupledMixup, {"num_classes": 3, "alpha": nan}),
        (DecoupledMixup, {"num_classes": 3, "eta": -1.0}),
    ]:
        with pytest.raises(ValueError, match=f"^{list(arguments)[-1]} must be"):
            make(**arguments)


def test_calls_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    loss = DecoupledMixupLoss()
    soft = soft_labels(A, B, LAM, 4)
    three = torch.tensor([[0.2, 0.3, 0.5, 0.0]]).expand(3, 4)
    cases = [
        ("lam", (LOGITS, A, B, 1.1)),
        ("lam", (LOGITS, A, B, -0.1)),
        ("lam", (LOGITS, A, B, float("nan"))),
        ("lam", (LOGITS, A, B, torch.tensor([0.1, 0.2, 1.5]))),
        ("lam", (LOGITS, A, B, torch.tensor([0.1, 0.2, float("nan")]))),
        ("lam", (LOGITS, A, B, torch.tensor([0.1, 0.2]))),
        ("lam", (LOGITS, A, B, torch.tensor([1, 0, 1]))),
        ("input", (LOGITS[:, :2], A.clamp(max=1), B.clamp(max=1), LAM)),
        ("input", (LOGITS[:0], A[:0], B[:0], LAM)),
        ("input", (LOGITS[0], soft[0])),
        ("target", (LOGITS, A + 2, B, LAM)),
        ("target_b", (LOGITS, A, B + 2, LAM)),
        ("target_b", (LOGITS, A, B[:2], LAM)),
        ("target_b", (LOGITS, A, B)),
        ("target_b", (LOGITS, soft, None, LAM)),
        ("target", (LOGITS, A)),
        ("target", (LOGITS, soft[:, :3])),
        ("target", (LOGITS, three)),
        ("target", (LOGITS, torch.zeros(3, 4))),
        ("target", (LOGITS, 0.5 * soft)),
        ("target", (LOGITS, soft * float("nan"))),
    ]
    for name, arguments in cases:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            loss(*arguments)
    x, y, generator = torch.rand(3, 2), torch.tensor([0, 1, 2]), torch.Generator()
    for name, arguments in [
        ("x", (torch.zeros(3, 2, dtype=torch.long), y, generator)),
        ("x", (x[:0], y[:0], generator)),
        ("y", (x, y[:2], generator)),
        ("y", (x, y.float(), generator)),
        ("y", (x, y + 1, generator)),
        ("y", (x, y - 1, generator)),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            Mixup(3)(*arguments)
