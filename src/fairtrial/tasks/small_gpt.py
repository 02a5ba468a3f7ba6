"""A small language model of bytes whose weights are ordinary floating-point numbers, trained once for compressing it.

It is a Llama of four layers with grouped heads, as `transformers` has it, trained for a few minutes on the part of the
task `text` that its test does not hold out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.tasks import text
from fairtrial.tasks.models import transformers
from fairtrial.tasks.streams import Streams

CONTEXT = 256  # bytes
STEPS, BATCH = 800, 8
THREADS = 2  # whatever the machine has, for sums in one order
PEAK_RATE, WARM_UP = 4e-3, 100
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def passages(part: str) -> Int[Tensor, "n t"]:
    """Windows of the context's length, from the 'test' part of the task `text` or from the other, 'training'.

    Each lies within one passage of the task, whose windows of 64 bytes follow each other.
    """
    data = text.samples()
    windows = data.x_test if part == "test" else data.x
    together = CONTEXT // text.CONTEXT
    return windows[: len(windows) // together * together].reshape(-1, CONTEXT)


def make(folder: Path, report: Callable[[str], None], *, steps: int = STEPS) -> None:
    """Train the model and write it and its tokenizer into a folder; the same on every run with one version of torch."""
    library = transformers()
    threads, streams = torch.get_num_threads(), Streams(0)
    torch.set_num_threads(THREADS)
    try:
        with streams.globally("model"):
            model = library.LlamaForCausalLM(library.LlamaConfig(**SHAPE, bos_token_id=10, eos_token_id=0))
        _train(model, passages("training"), streams("order"), steps, report)
    finally:
        torch.set_num_threads(threads)
    model.eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _train(
    model: Any, data: Int[Tensor, "n t"], order: torch.Generator, steps: int, report: Callable[[str], None]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / WARM_UP, max(0.0, (steps - step) / max(1, steps - WARM_UP)))
    )
    for step in range(1, steps + 1):
        batch = data[torch.randint(len(data), (BATCH,), generator=order)]
        scores = model(batch).logits[:, :-1]
        loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            report(f"training: step {step} of {steps}, loss {loss.item():.3f}")


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the bytes of the text, by their value."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = {letter: byte for byte, letter in _letters().items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level vocabularies: itself if it is printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
