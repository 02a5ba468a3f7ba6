import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import EpisodeLoss, ICNNLoss, ProtoTripletLoss, compute_prototypes, icnn_score


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


SUPPORT = double([[0, 0], [0.2, 0.1], [1, 1], [1.1, 0.8], [0, 1], [0.1, 1.2]])
SUPPORT_LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
QUERIES = double([[0.1, 0.3], [0.9, 0.9], [0.3, 0.9], [0.6, 0.5]])
QUERY_LABELS = torch.tensor([0, 1, 2, 0])
PROTOTYPES = double([[0.1, 0.05], [1.05, 0.9], [0.05, 1.1]])
FULL, FULL_LABELS = torch.cat([SUPPORT, QUERIES]), torch.cat([SUPPORT_LABELS, QUERY_LABELS])

OFFSETS = double([[0, 0], [0.1, 0.02], [-0.03, 0.2], [-0.3, 0.05], [0.07, -0.41]])
CLUSTERS = torch.cat(
    [double(c) + f * OFFSETS for c, f in (([0, 0], 1.0), ([10, 0], 1.1), ([0, 12], 0.9))]  # three tight, far ones
)
CLUSTER_LABELS = torch.arange(3).repeat_interleave(5)


def near(value: torch.Tensor, expected: float, tolerance: float = 1e-6) -> None:
    assert value.item() == pytest.approx(expected, abs=tolerance)


def test_prototypes_are_the_means_of_their_classes():
    torch.testing.assert_close(compute_prototypes(SUPPORT, SUPPORT_LABELS, 3), PROTOTYPES)
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    torch.testing.assert_close(compute_prototypes(SUPPORT[order], SUPPORT_LABELS[order], 3), PROTOTYPES)


def test_golden_proto_triplet():
    near(ProtoTripletLoss()(QUERIES, QUERY_LABELS, PROTOTYPES), 0.160190)
    order = torch.tensor([2, 0, 1])
    near(ProtoTripletLoss()(QUERIES, QUERY_LABELS, PROTOTYPES[order], order), 0.160190)


def test_proto_triplet_is_zero_where_every_query_is_closer_to_its_prototype_by_the_margin():
    queries = double([[0.1, 0.0], [4.0, 0.2]]).requires_grad_()
    loss = ProtoTripletLoss(margin=3.0)(queries, torch.tensor([0, 1]), double([[0, 0], [4, 0]]))
    loss.backward()
    assert loss == 0
    assert queries.grad.count_nonzero() == 0


def test_proto_triplet_pulls_a_violating_query_from_the_wrong_prototype_to_its_own():
    queries = QUERIES.clone().requires_grad_()
    losses = ProtoTripletLoss(reduction="none")(queries, QUERY_LABELS, PROTOTYPES)
    losses.mean().backward()
    away = queries.detach()[:, None] - PROTOTYPES
    distance = (away.square().sum(2) + 1e-6).sqrt()
    own = F.one_hot(QUERY_LABELS).bool()
    wrong = F.one_hot(distance.masked_fill(own, math.inf).argmin(1), 3).bool()
    directions = away / distance[:, :, None]
    expected = (directions[own] - directions[wrong]) / len(queries)
    torch.testing.assert_close(queries.grad, expected.masked_fill(losses.detach()[:, None] == 0, 0.0))
    assert 0 < losses.count_nonzero() < len(queries)


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((SUPPORT, SUPPORT_LABELS), {}, 0.897556),
        ((FULL, FULL_LABELS), {"k": 4}, 0.607936),
        ((FULL, FULL_LABELS), {"k": 2, "items_per_class": 3}, 0.882391),
        ((QUERIES, QUERY_LABELS, SUPPORT, SUPPORT_LABELS), {"k": 2, "reference": True}, 0.546628),
        ((CLUSTERS, CLUSTER_LABELS), {"items_per_class": 5}, 0.991273),
        ((CLUSTERS, CLUSTER_LABELS), {"items_per_class": 4}, 1.000000),
        ((CLUSTERS, torch.arange(15) % 3), {"items_per_class": 5}, 0.297974),
    ],
)
def test_golden_scores(arguments, options, expected):
    near(icnn_score(*arguments, **options), expected)
    near(ICNNLoss(**options)(*arguments), -math.log(expected), 2e-6)


def test_golden_loss():
    near(ICNNLoss()(SUPPORT, SUPPORT_LABELS), 0.108080)


@settings(deadline=None, max_examples=20)
@given(angle=st.floats(0, 6.3), scale=st.floats(0.5, 50), shift=st.floats(-9, 9))
def test_turning_moving_and_scaling_leave_the_score(angle, scale, shift):
    turn = double([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    score = icnn_score(FULL, FULL_LABELS)
    near(icnn_score(FULL @ turn + shift, FULL_LABELS), score.item(), 1e-9)
    near(icnn_score(scale * FULL, FULL_LABELS), score.item(), 1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), k=st.integers(1, 12))
def test_the_score_is_within_0_and_1_whatever_the_names_of_classes(seed, k):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    labels = torch.arange(9) % 4
    score = icnn_score(embeddings, labels, k=k)
    assert 0 <= score <= 1
    torch.testing.assert_close(icnn_score(embeddings, 70 - 9 * labels, k=k), score)


def test_duplicates_count_and_only_the_embedding_itself_is_left_out():
    pairs, labels = double([[0, 0], [0, 0], [3, 0], [3, 0]]), torch.tensor([0, 1, 0, 1])
    near(icnn_score(pairs, labels, k=1), 0.25, 1e-4)  # A = gamma = 0 and E = 1: no nearest neighbour is of the class
    near(icnn_score(pairs, torch.tensor([0, 0, 1, 1]), k=1), 1.0, 1e-3)


def test_a_query_may_use_the_nearest_of_the_support():
    support, labels = double([[0, 0], [1, 0], [5, 0], [6, 0]]), torch.tensor([0, 0, 1, 1])
    queries, wanted = double([[0.0, 0.1], [6.0, 0.1]]), torch.tensor([0, 1])
    ours = icnn_score(queries, wanted, support, labels, k=1, items_per_class=2)
    codes = icnn_score(queries, wanted, support, labels, k=1, items_per_class=2, reference=True)
    near(ours, 1.0)  # no other class in sight, and the nearest is of the query's own
    assert codes < 1.0  # the second and third nearest, of which the third is of the other class


def test_a_support_of_one_shot_has_nothing_to_bring_together():
    embeddings, labels = double([[0, 0], [1, 0], [0, 2], [3, 3], [5, 0], [9, 4], [2, 7]]), torch.arange(7)
    inter = 4 * icnn_score(embeddings, labels)  # A = gamma = 0
    assert 0 < inter < 1
    near(icnn_score(embeddings, labels, reference=True), (0.5 * (1 + inter.item())) / 2)


def test_separated_embeddings_have_loss_and_gradient_zero_and_shares_no_gradient():
    embeddings = CLUSTERS.clone().requires_grad_()
    loss = ICNNLoss(items_per_class=4)(embeddings, CLUSTER_LABELS)
    loss.backward()
    assert loss.abs() < 1e-12
    assert embeddings.grad.count_nonzero() == 0


def test_the_gradient_of_the_loss_is_its_derivative_also_in_targets():
    generator = torch.Generator().manual_seed(0)
    near_queries, near_support = (  # without ties
        (x + 0.03 * torch.randn(x.shape, generator=generator, dtype=x.dtype)).requires_grad_()
        for x in (QUERIES, SUPPORT)
    )
    loss = ICNNLoss(k=2)
    assert torch.autograd.gradcheck(lambda s: loss(s, SUPPORT_LABELS), near_support)
    assert torch.autograd.gradcheck(lambda q, s: loss(q, QUERY_LABELS, s, SUPPORT_LABELS), (near_queries, near_support))


def test_an_episode_is_the_mean_of_its_terms():
    support, queries = CLUSTERS.view(3, 5, 2)[:, :2], 0.7 * CLUSTERS.view(3, 5, 2)[:, 2:]
    known, wanted = torch.arange(3).repeat_interleave(2), torch.arange(3).repeat_interleave(3)
    s, q = support.flatten(0, 1), queries.flatten(0, 1)
    prototypes = compute_prototypes(s, known, 3)
    both = torch.cat([s, q]), torch.cat([known, wanted])
    expected = {
        "cross": F.cross_entropy(-torch.cdist(q, prototypes).square() / 20.0, wanted),
        "prototriplet": ProtoTripletLoss(9.0)(q, wanted, prototypes),
        "suppicnn": ICNNLoss(3)(s, known),
        "queryicnn": ICNNLoss(3)(q, wanted, s, known),
        "fullicnn": ICNNLoss(3, items_per_class=5)(*both),
    }
    for terms in (*([name] for name in expected), ["cross", "prototriplet", "fullicnn"], list(expected)):
        value = EpisodeLoss(terms, 9.0, temperature=20.0, k=3)(support, queries)
        torch.testing.assert_close(value, sum(expected[term] for term in terms) / len(terms))


def test_misuse_is_refused_with_the_argument_named():
    for terms in ([], ["cross", "cross"], ["icnn"], "cross"):
        with pytest.raises(ValueError, match="^terms must be a list of some of cross, "):
            EpisodeLoss(terms)
    for options in ({"margin": -1.0}, {"margin": math.nan}, {"temperature": 0.0}, {"k": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
            EpisodeLoss(**options)
    for options in ({"k": 0}, {"items_per_class": 3}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
            ICNNLoss(**options)
    with pytest.raises(ValueError, match="^margin must be"):
        ProtoTripletLoss(math.nan)
    one_class = torch.zeros(6, dtype=torch.long)
    for name, call in {
        "labels": lambda: ICNNLoss()(SUPPORT, one_class),
        "embeddings": lambda: ICNNLoss()(SUPPORT[:2], SUPPORT_LABELS[:2]),
        "targets": lambda: ICNNLoss()(QUERIES, QUERY_LABELS, SUPPORT[:2], SUPPORT_LABELS[:2]),
        "items_per_class": lambda: ICNNLoss(items_per_class=6)(SUPPORT, SUPPORT_LABELS),
        "target_labels": lambda: ICNNLoss()(QUERIES, QUERY_LABELS, SUPPORT),
        "query_labels": lambda: ProtoTripletLoss()(QUERIES, QUERY_LABELS + 1, PROTOTYPES),
        "prototypes": lambda: ProtoTripletLoss()(QUERIES[:1], QUERY_LABELS[:1], PROTOTYPES[:1]),
        "queries": lambda: ProtoTripletLoss()(QUERIES * math.nan, QUERY_LABELS, PROTOTYPES),
        "support": lambda: EpisodeLoss(["suppicnn"])(SUPPORT[:2, None], QUERIES.view(2, 2, 2)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call()
    with pytest.raises(ValueError, match=r"^labels must be all of 0\.\.3"):
        compute_prototypes(SUPPORT, SUPPORT_LABELS, 4)
