import pytest
import torch

from fairtrial.tasks.docs_retrieval import (
    QUERY,
    WINDOW,
    AnySpan,
    WordSums,
    area_over_queries,
    docs_retrieval,
    mean_reciprocal_rank,
    samples,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_windows_are_words_and_their_blocks_stay_together() -> None:
    data = samples()
    assert data.x.shape[1] == WINDOW
    assert len(data.x_test) > 150
    assert data.x.dtype == torch.long
    training, test = ({row.numpy().tobytes() for row in part} for part in (data.x, data.x_test))
    assert not training & test
    assert data.groups is not None
    assert torch.bincount(data.groups).max() == 4


def test_any_span_can_be_the_query_and_no_word_gets_lost() -> None:
    x = torch.arange(WINDOW).expand(500, WINDOW)
    found, labels = AnySpan()(x, torch.zeros(500, dtype=torch.long), generator())
    assert torch.equal(found.sort(1).values, x)
    assert set(found[:, 0].tolist()) == set(range(WINDOW - QUERY + 1))
    assert torch.equal(found[:, QUERY - 1], found[:, 0] + QUERY - 1)
    assert len(labels) == 500


def test_a_window_becomes_a_query_and_a_passage() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WordSums()
    x = samples().x[:2]
    query, passage = model(x).unbind(1)
    vectors = model.vectors.weight
    torch.testing.assert_close(query[1], vectors[x[1, :QUERY]].sum(0))
    with torch.no_grad():
        model.weights.weight[x[1, -1]] = 0.0
    others = x[1, QUERY:][x[1, QUERY:] != x[1, -1]]
    torch.testing.assert_close(model(x)[1, 1], vectors[others].sum(0))
    assert not torch.allclose(model(x)[1, 1], passage[1])


def test_ranks_and_areas() -> None:
    topic = torch.zeros(12, dtype=torch.long)
    perfect = torch.eye(12)[:, None].expand(12, 2, 12)
    assert mean_reciprocal_rank(perfect, topic) == 1.0
    assert area_over_queries(perfect, topic) == 1.0
    assert mean_reciprocal_rank(torch.ones(12, 2, 3), topic) == 0.0  # of equal scores the own is the last
    assert area_over_queries(torch.ones(12, 2, 3), topic) == 0.5
    turned = torch.stack([torch.eye(12), torch.eye(12) + 2 * torch.eye(12).roll(1, 0)], 1)
    assert mean_reciprocal_rank(turned, topic) == pytest.approx(0.5)


def test_training_is_of_use_and_does_not_saturate() -> None:
    outcome = docs_retrieval.run({}, 0, split="test")
    assert 0.2 < outcome.value < 0.6
    assert 0.7 < outcome.metrics["pooled AUC"] < 0.97
