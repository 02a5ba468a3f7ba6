"""Sampling with a generator of one's own."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fairtrial.methods.decoding import sample, superposed_generate
from fairtrial.methods.decoding.sampling import Continuation, end_tokens, padding_token, tempered

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


def test_misuse_is_refused(small_gpt, monkeypatch):
    model, tokenizer = small_gpt
    ids, mask = prompts(tokenizer)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        sample(model, ids, mask, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        sample(model, ids, mask, max_new_tokens=1, temperature=float("nan"))
    with pytest.raises(ValueError, match="attention_mask must be 1 at the end"):
        sample(model, ids, mask.flip(1), max_new_tokens=1)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="attention_mask must be of the shape of input_ids"):
        sample(model, ids, mask[:, 1:], max_new_tokens=1)
    with pytest.raises(ValueError, match="input_ids must be of at least one token"):
        sample(model, ids[:, :0], max_new_tokens=1)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {"num_attention_heads": 2, "intermediate_size": 64}


def made(kind, config):
    """A tiny model with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


@pytest.fixture
def llama():
    return made(LlamaForCausalLM, LlamaConfig(**SIZES, **HEADS))


@pytest.mark.parametrize(
    "cacheless",
    [
        lambda: made(MambaForCausalLM, MambaConfig(**SIZES, state_size=4)),
        lambda: made(OpenAIGPTLMHeadModel, OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2)),
    ],
)
def test_a_model_without_a_cache_of_keys_is_given_the_whole_text(cacheless):
    model, ids = cacheless(), torch.tensor([[1, 2, 3]])
    text = sample(model, ids, max_new_tokens=5, processors=[TopKLogitsWarper(1)], eos_token_id=())
    with torch.no_grad():
        assert torch.equal(model(text).logits[0, 2:-1].argmax(-1), text[0, 3:])
    by_embedding, by_token = Continuation(model, ids), Continuation(model, ids)
    for token in (7, 9):
        by_token.extend(input_ids=torch.tensor([[token]]))
        by_embedding.extend(inputs_embeds=model.get_input_embeddings()(torch.tensor([[token]])).detach())
    torch.testing.assert_close(by_embedding.logits, by_token.logits)
    superposed = superposed_generate(model, ids, max_new_tokens=5, num_drafts=1, n_candidates=3, eos_token_id=())
    assert torch.equal(superposed.sequences[0], text)


def test_what_continues_no_text_is_refused(llama):
    masked = BertForMaskedLM(BertConfig(**SIZES, **HEADS))
    headless = LlamaModel(llama.config)
    for model in (masked, headless, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"model must be a causal language model .*{type(model).__name__}"):
            sample(model, torch.tensor([[1, 2]]), max_new_tokens=1)
        with pytest.raises(ValueError, match="model must be a causal language model"):
            superposed_generate(model, torch.tensor([[1, 2]]), max_new_tokens=1)
        with pytest.raises(ValueError, match="model must be a causal language model"):
            Continuation(model, torch.tensor([[1, 2]]))


def test_a_model_without_generation_config_has_no_end_tokens(llama):
    llama.generation_config = None
    ends = end_tokens(llama, None)
    assert ends.tolist() == []
    assert padding_token(llama, ends) == 0
    assert sample(llama, torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 5)


def test_padding_on_the_left_changes_nothing_under_an_adapter(llama):
    adapted = get_peft_model(
        llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    ids, padded = torch.tensor([[4, 5, 6]]), torch.tensor([[0, 0, 4, 5, 6]])
    plain = Continuation(adapted.eval(), ids)
    torch.testing.assert_close(Continuation(adapted, padded, (padded > 0).long()).logits, plain.logits)


def test_tiny_temperatures_are_greedy(llama):
    ids = torch.tensor([[1, 2, 3]])
    greedy = sample(llama, ids, max_new_tokens=5, processors=[TopKLogitsWarper(1)], eos_token_id=())
    for temperature in (1e-6, 1e-38, 5e-324):
        assert torch.equal(sample(llama, ids, max_new_tokens=5, temperature=temperature, eos_token_id=()), greedy)
    logits = torch.tensor([[3.0, 5.0, -math.inf, 5.0], [0.0, 0.0, 0.0, -math.inf]])
    for temperature in (1e-38, 1e-300):
        probs = tempered(logits, temperature).softmax(-1)
        torch.testing.assert_close(probs, torch.tensor([[0, 0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3, 0]]))
    assert torch.equal(tempered(logits, 0.7), logits / 0.7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 1, "temperature": math.inf}, "temperature must be above 0 and finite"),
        ({"max_new_tokens": 1, "eos_token_id": 2.5}, "eos_token_id must be one or several whole"),
        ({"max_new_tokens": 1, "eos_token_id": [1, True]}, "eos_token_id must be one or several whole"),
    ],
)
def test_numbers_out_of_range_are_refused(llama, monkeypatch, options, said):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=said):
        sample(llama, torch.tensor([[1, 2]]), **options)
