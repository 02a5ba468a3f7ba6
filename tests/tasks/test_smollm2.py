"""Tasks of SmolLM2 at inference, on short passages."""

from dataclasses import replace

import pytest
import torch

from fairtrial.contract import BadInput, Choice
from fairtrial.tasks import documentation, load, models
from fairtrial.tasks.models import Loaded
from fairtrial.tasks.smollm2 import SCORED
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import TrainedTask, held


def short(name: str, length: int) -> TrainedTask:
    task = load(name)
    assert isinstance(task, TrainedTask)
    return replace(task, length=length)


def test_perplexity_is_that_of_one_whole_forward(smollm2: Loaded) -> None:
    task = short("smollm2-perplexity", SCORED + 64)
    task.check({"cache": Choice("DynamicCache")})
    outcome = task.run({}, 3, split="test")
    ids = documentation.windows(documentation.tokens(smollm2.tokenizer, "test"), 1, SCORED + 64, Streams(3)("passages"))
    with torch.no_grad():
        logits = smollm2.model(ids).logits[0, -SCORED:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, -SCORED + 1 :])
    assert outcome.value == pytest.approx(float(expected), rel=1e-4)
    assert outcome.costs.peak_memory == (SCORED + 63) * 30 * 2 * 3 * 64 * 4  # layers, keys and values, heads, float32
    assert outcome.costs.step_time is not None
    again = task.run({}, 3, split="test")
    assert again.value == outcome.value
    assert task.run({}, 3).value != outcome.value


def test_facts_are_found_in_short_passages(smollm2: Loaded) -> None:
    outcome = short("smollm2-retrieval", 96).run({}, 0)
    assert outcome.value >= 0.75
    assert len(outcome.metrics) == 4


def test_parts_of_the_text_have_nothing_in_common(smollm2: Loaded) -> None:
    parts = [documentation.tokens(smollm2.tokenizer, part) for part in documentation.ENDS]
    whole = torch.tensor(smollm2.tokenizer(documentation.text()).input_ids)
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(BadInput, match="passages of 9 tokens cannot be cut from 8"):
        documentation.windows(torch.arange(8), 1, 9, torch.Generator())


def test_bytes_of_a_cache_are_those_of_its_tensors(smollm2: Loaded) -> None:
    cache = models.transformers().DynamicCache(config=smollm2.model.config)
    assert held(cache) == 0
    with torch.no_grad():
        smollm2.model(torch.arange(5)[None], past_key_values=cache)
    assert held(cache) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_a_model_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FAIRTRIAL_MODELS", str(tmp_path))
    with pytest.raises(BadInput, match="`fairtrial models smollm2` gets it"):
        load("smollm2-perplexity").check({})


def test_slots_that_are_not_there_are_refused() -> None:
    with pytest.raises(BadInput, match="no slot 'optimizer'; it has: cache"):
        load("smollm2-perplexity").check({"optimizer": Choice("AdamW")})
