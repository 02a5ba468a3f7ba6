"""What a decoder adds to the time of a generated token on SmolLM2, and three drafts at once against one by one.

    OMP_NUM_THREADS=2 python benchmarks/decoding.py [ROUNDS]

All generate as many tokens after the same 15 tokens; who is first alternates within a round. Printed are milliseconds
per new token, medians over rounds, and the median ratio within rounds with the range of its middle half: of processors
to plain multinomial sampling, and of three drafts sampled one after the other, or in one batch, to superposed decoding
of three, which may use n-grams counted on documentation text, opened from disk.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import compared, line
from transformers import LogitsProcessorList

from fairtrial.methods.decoding import (
    MirostatLogitsProcessor,
    NGramInterpolator,
    TopHLogitsProcessor,
    superposed_generate,
)
from fairtrial.tasks import documentation, models

PROMPT, NEW, DRAFTS = 15, 32, 3


def main(rounds: int) -> None:
    model, tokenizer = models.load("smollm2")
    corpus = documentation.tokens(tokenizer, "calibration")
    ids = documentation.tokens(tokenizer, "test")[None, 1000 : 1000 + PROMPT]
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW, "min_new_tokens": NEW}

    def sampled(times: int = 1, rows: int = 1, **more: object) -> Callable[[], None]:
        def work() -> None:
            for _ in range(times):
                start = ids.repeat(rows, 1)
                model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **options, **more)

        return work

    def superposed(ngram: NGramInterpolator | None) -> Callable[[], None]:
        def work() -> None:
            superposed_generate(model, ids, num_drafts=DRAFTS, max_new_tokens=NEW, ngram=ngram, eos_token_id=())

        return work

    print(f"torch {torch.__version__}  {torch.get_num_threads()} threads  {PROMPT} + {NEW} tokens, time per new token")
    processors = {
        "multinomial, again": [],
        "top-H": [TopHLogitsProcessor()],
        "top-H, partial entropy of the first 100": [TopHLogitsProcessor(criterion="partial", top_n=100)],
        "mirostat 1": [MirostatLogitsProcessor()],
        "mirostat 2": [MirostatLogitsProcessor(version=2)],
    }
    for name, own in processors.items():
        rows = compared(sampled(logits_processor=LogitsProcessorList(own)), sampled(), rounds=rounds)
        print(line(f"{name} / multinomial", [(a / NEW, b / NEW) for a, b in rows]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        counted = NGramInterpolator().fit(corpus)
        counted.save(Path(folder, "ngrams"))
        opened = NGramInterpolator.load(Path(folder, "ngrams"))
        for name, ngram in (("", None), (" with n-grams", opened)):
            for words, plain in (
                ("one after the other", sampled(times=DRAFTS)),
                ("in one batch", sampled(rows=DRAFTS)),
            ):
                rows = compared(plain, superposed(ngram), rounds=rounds)
                what = f"{DRAFTS} drafts {words} / superposed{name}"
                print(line(what, [(a / NEW, b / NEW) for a, b in rows]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
