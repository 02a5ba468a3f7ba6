"""Sampling with a generator of one's own."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fairtrial.methods.decoding import sample
from fairtrial.methods.decoding.sampling import Continuation

TEXTS = ("The class statement", "An expression list containing")


def prompts(tokenizer):
    rows = [tokenizer(text).input_ids for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_the_likeliest_token_alone_is_greedy_generation(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    ours = sample(model, ids, mask, max_new_tokens=20, processors=[TopKLogitsWarper(1)], eos_token_id=())
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)


def test_draws_and_their_order_are_those_of_generate(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=1.3, top_k=0, pad_token_id=0,
            logits_processor=[TopPLogitsWarper(0.9)],
        )  # fmt: skip
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    ours = sample(
        model, ids, mask, max_new_tokens=20, processors=[TopPLogitsWarper(0.9)], temperature=1.3, generator=generator
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_end_at_an_end_token_and_are_padded(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    whole = sample(model, ids, mask, max_new_tokens=30, generator=torch.Generator().manual_seed(0), eos_token_id=())
    end = int(whole[0, ids.shape[1] + 3])
    options = {"max_new_tokens": 30, "eos_token_id": [end, 999]}
    ended = sample(model, ids, mask, generator=torch.Generator().manual_seed(0), **options)
    first = whole[0, ids.shape[1] :].tolist().index(end) + ids.shape[1]
    assert torch.equal(ended[0, : first + 1], whole[0, : first + 1])
    assert torch.all(ended[0, first + 1 :] == end)  # it has no padding token of its own
    alone = sample(model, ids[:1], mask[:1], processors=[TopKLogitsWarper(1)], max_new_tokens=50, eos_token_id=end)
    assert alone.shape[1] <= ids.shape[1] + 50


def test_a_streamer_is_told_prompt_tokens_and_end(small_gpt):
    class Recorder:
        def __init__(self):
            self.told = []

        def put(self, value):
            self.told.append(value.flatten().tolist())

        def end(self):
            self.told.append("end")

    model, tokenizer = small_gpt
    ids, recorder = tokenizer("A list", return_tensors="pt").input_ids, Recorder()
    text = sample(model, ids, max_new_tokens=4, eos_token_id=(), streamer=recorder)[0].tolist()
    assert recorder.told == [text[:6], *([token] for token in text[6:]), "end"]


def test_a_continuation_takes_embeddings_for_tokens(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    by_token, by_embedding = (Continuation(model, ids, mask) for _ in range(2))
    tokens = torch.tensor([[65], [66]])
    by_token.extend(input_ids=tokens)
    by_embedding.extend(inputs_embeds=model.get_input_embeddings()(tokens))
    torch.testing.assert_close(by_token.logits, by_embedding.logits)
    with torch.no_grad():
        alone = model(torch.cat([ids[:1][mask[:1].bool()], tokens[0]])[None]).logits[:, -1]
    torch.testing.assert_close(by_token.logits[:1], alone, rtol=1e-4, atol=1e-4)


def test_misuse_is_refused(small_gpt):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        sample(model, ids, mask, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        sample(model, ids, mask, max_new_tokens=1, temperature=float("nan"))
    with pytest.raises(ValueError, match="attention_mask must be 1 at the end"):
        sample(model, ids, mask.flip(1), max_new_tokens=1)
    with pytest.raises(ValueError, match="input_ids must be of at least one token"):
        sample(model, ids[:, :0], max_new_tokens=1)
