"""How small a cache of SmolLM2's keys and values may be at 1 % more perplexity, and how long a token then takes.

    OMP_NUM_THREADS=2 python benchmarks/kv_caches.py [PASSAGES] [ROUNDS] [NAMES…]

Every cache has a ladder of settings, from small to large. On passages of 2048 tokens of the documentation's validation
part, of which the last 256 are predicted, the first setting is taken that raises perplexity by at most 1 %, or the last
one. Printed are, on twice as many passages of the test part: the mean rise of perplexity with its 95 % interval, and
bytes as a part of the plain cache's; and at 4096 tokens, of the smallest setting and of that one, milliseconds of one
more token, beside the plain cache in turn: medians, and the median ratio with the range of its middle half, and bytes.
What a cache needs is fitted once, on passages of the calibration part. Of a cache that reads no more than some of its
bytes for a token, these are printed too.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from side_by_side import compared, line
from torch import Tensor
from transformers import DynamicCache

from fairtrial.methods.kvcache import (
    CSKVCache,
    PrefixKVCache,
    RotateKVCache,
    VQKeyCache,
    XKVCache,
    calibrate_channel_order,
    factorize_cskv,
    train_codebooks,
    train_cskv,
)
from fairtrial.methods.kvcache.held import shape_of
from fairtrial.tasks import documentation, load, models
from fairtrial.tasks.smollm2 import perplexity
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import Trial, held, part_of, prepared
from fairtrial.trial.statistics import mean_interval

ALLOWED, LONG = 0.01, 4096
TASK: Any = load("smollm2-perplexity")
Make = Callable[[], Any]


def ladders(model: Any) -> dict[str, Callable[[], Iterator[tuple[str, Make]]]]:
    """For each cache the settings, from small to large, and what makes a cache so."""
    config = model.config
    _, heads, width = shape_of(config)
    calibration = torch.split(documentation.windows(part_of("smollm2", "calibration"), 8, 512, Streams(0)("text")), 1)

    def xkv() -> Iterator[tuple[str, Make]]:
        channels = 4 * heads * width
        for keys, values in ((1 / 8, 3 / 16), (1 / 4, 3 / 8), (1 / 2, 5 / 8), (5 / 8, 3 / 4), (3 / 4, 7 / 8)):
            ranks = {"rank_k": round(keys * channels), "rank_v": round(values * channels)}
            yield f"ranks {keys:g} and {values:g}", partial(XKVCache, config, **ranks)

    def rotate() -> Iterator[tuple[str, Make]]:
        order = calibrate_channel_order(model, calibration)
        for bits in (2, 3, 4, 5, 6, 8):
            yield f"{bits} bits", partial(RotateKVCache, config, bits=bits, order=order)

    def cskv() -> Iterator[tuple[str, Make]]:
        for density in (0.5, 0.7, 0.9):
            for bits in (4, None):
                held_in = {"k_bits": bits, "v_bits": bits}
                factors = factorize_cskv(model, density, density, calibration)
                train_cskv(factors, model, calibration, lr=1e-3, steps=100, **held_in)
                yield f"density {density:g}" + (", 4 bits" if bits else ""), partial(CSKVCache, factors, **held_in)

    def prefix() -> Iterator[tuple[str, Make]]:
        for share in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95):
            yield f"{share:.0%} kept", partial(PrefixKVCache, config, share)

    def lookup() -> Iterator[tuple[str, Make]]:
        books = train_codebooks(model, calibration, Streams(0)("method"), max_iter=25)
        for share in (0.03, 0.06, 0.12, 0.25, 0.5):
            yield f"{share:.0%} looked up", partial(VQKeyCache, model, books, top_ratio=share)

    return {"xKV": xkv, "RotateKV": rotate, "CSKV": cskv, "PrefixKV": prefix, "A2ATS": lookup}


def losses(make: Make, split: str, count: int) -> tuple[list[float], float]:
    """Nats per token of each passage, and the mean of bytes."""
    found = []
    for seed in range(count):
        setting, passages = TASK.given(seed, split)
        with torch.no_grad():
            nats, _, costs = perplexity(Trial(TASK, setting, {"cache": make()}, passages, Streams(seed)))
        found.append((nats, costs.peak_memory or 0))
    nats_of, sizes = zip(*found, strict=True)
    return list(nats_of), sum(sizes) / count


def rises(found: list[float], plain: list[float]) -> list[float]:
    """Relative rises of perplexity."""
    return [math.exp(a - b) - 1 for a, b in zip(found, plain, strict=True)]


@torch.no_grad()
def filled(model: Any, cache: Any) -> Any:
    """The cache after 4096 tokens."""
    with prepared(cache, model):
        model(part_of("smollm2", "test")[None, :LONG], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def one_more(model: Any, cache: Any) -> Callable[[], None]:
    token = part_of("smollm2", "test")[None, LONG : LONG + 1]

    @torch.no_grad()
    def work() -> None:
        with prepared(cache, model):
            model(token, past_key_values=cache, use_cache=True)

    return work


def read_for_a_token(cache: VQKeyCache) -> float:
    """The part of the bytes held that a token's attention reads: all codes, and the exact tokens looked up."""
    numbers: list[Tensor] = [layer.codes for layer in cache.layers if layer.codes is not None]
    exact = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return (sum(n.nbytes for n in numbers) + cache.top_ratio * exact) / held(cache)


def main(count: int, rounds: int, names: list[str]) -> None:
    model = models.load("smollm2").model
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}  {threads} threads  {count} passages to choose by, {2 * count} to judge by")
    make_plain = partial(DynamicCache, config=model.config)
    validation, _ = losses(make_plain, "validation", count)
    test, whole = losses(make_plain, "test", 2 * count)
    for name, ladder in ladders(model).items():
        if names and name not in names:
            continue
        tried: dict[str, Make] = {}
        for words, make in ladder():
            tried[words] = make
            found, _ = losses(make, "validation", count)
            rise = sum(rises(found, validation)) / count
            print(f"    {name}, {words}: {rise:+.2%} on validation passages", flush=True)
            if rise <= ALLOWED:
                break
        found, size = losses(make, "test", 2 * count)
        change = rises(found, test)
        low, high = mean_interval(change)
        print(
            f"{name}, {words}: perplexity {sum(change) / len(change):+.2%} [{low:+.2%}, {high:+.2%}], "
            f"{size / whole:.3f} of the plain cache's bytes, {whole / size:.2f} times less"
        )
        for setting in dict.fromkeys((next(iter(tried)), words)):
            cache, plain = filled(model, tried[setting]()), filled(model, make_plain())
            rows = compared(one_more(model, cache), one_more(model, plain), rounds=rounds)
            print(line(f"    {name}, {setting} / plain, a token after {LONG}", rows))
            print(f"        holds {held(cache) / held(plain):.3f} of the bytes", end="")
            lookup = isinstance(cache, VQKeyCache)
            print(f", reads {read_for_a_token(cache):.3f} of what it holds for a token" if lookup else "")
        sys.stdout.flush()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 4, int(arguments[1]) if len(arguments) > 1 else 9, arguments[2:])
