"""SmolLM2 continues beginnings of paragraphs; what it writes is held against how the paragraphs went on.

No likelihood is good in itself: text that is too likely repeats itself, text that is too unlikely makes no sense. The
metric is how far the continuations are, in nats per token under the unmodified model, from what people wrote there;
diversity and repetition stand beside it.
"""

from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fairtrial.contract import Choice, Costs, Diverged, Metric, Slot
from fairtrial.methods.arguments import require
from fairtrial.methods.decoding.sampling import end_tokens
from fairtrial.methods.registry import Integer, Method, Uniform
from fairtrial.methods.whole import require_whole
from fairtrial.tasks import documentation
from fairtrial.tasks.models import transformers
from fairtrial.tasks.slots import Options
from fairtrial.tasks.trained import TrainedTask, Trial, loaded

BEGINNING, NEW = 16, 40  # tokens that are given, and tokens that are written
# written for this task; the words after the beginning are what people's continuations are judged by
PARAGRAPHS = (
    "The ferry leaves the old harbour at seven in the morning and needs an hour to the island. In winter only three "
    "people were ever on board: the captain, the woman who brings the post, and a teacher who has taught the same "
    "four children for six years and would not trade them for any class in the city.",
    "Bread rises because yeast eats the sugar in the flour and gives off gas, which the dough cannot let go. If the "
    "kitchen is cold, this takes half a day, and bakers say that the slow loaf tastes better. It keeps longer too, "
    "because the acids that form over night hold off mould.",
    "My grandfather kept his tools in a chest that nobody else was allowed to open. When he died we found every "
    "chisel sharpened and oiled, each in its own place, and at the bottom a notebook in which he had written down, "
    "for forty years, what he had repaired, for whom, and what they had paid him.",
    "A good map leaves things out. The walker wants to see paths, springs and steep places, and not where one "
    "parish ends and another begins. Whoever draws everything that is known about a piece of land has made a "
    "picture in which nobody finds the way home before dark.",
    "The bridge was closed after engineers found cracks in two of its cables. Drivers now have to go around by the "
    "northern road, which adds twenty minutes to the trip. The city expects the repair to last until autumn, and "
    "asks for patience, since parts of that size are made by a single company.",
    "Swifts spend almost their whole life in the air. They eat, drink and even sleep while they fly, and come down "
    "only to lay eggs under a roof. A young bird that leaves its nest for the first time may not touch anything "
    "solid again for two or three years.",
    "Before you replace the battery, switch the device off and pull out the plug. Open the cover with a flat "
    "screwdriver and note which way round the old cell lies. Put the new one in, close the cover until it clicks, "
    "and leave the device on its charger for at least four hours before the first use.",
    "In the village where I grew up, the market was on Thursdays. Farmers came down from the hills with cheese and "
    "honey, and a man with one arm sold knives so sharp that he cut sheets of paper in the air to prove it. We "
    "children stood around him until our mothers called.",
    "When a star has burnt the hydrogen in its core, gravity wins for a while and the core shrinks. It gets hotter "
    "until helium begins to burn, and the outer layers swell. Our own sun will reach that stage in about five "
    "billion years and will then swallow the inner planets.",
    "The committee met twice last month and agreed on three things. The library will stay open on Sundays, the old "
    "swimming pool will be sold, and the money from that sale will go to the school. There was one vote against, "
    "from the member who had learnt to swim there.",
    "Chess players who lose a piece early often play better afterwards. They stop hoping for a mistake and begin to "
    "look for the one plan that is left to them. Their opponents, meanwhile, relax, exchange what they can, and now "
    "and then discover too late that the position has come alive again.",
    "Nobody knows who built the stone circle above the lake. The stones come from a quarry thirty miles away, and "
    "moving them must have taken hundreds of people for several summers. Under the largest one archaeologists found "
    "the bones of a dog, laid down with care, and a bowl with traces of barley.",
)


def paragraphs(
    name: str, part: documentation.Part, count: int, length: int, generator: torch.Generator
) -> Int[Tensor, "n t"]:
    """The first tokens of the paragraphs, the same for all seeds; passages of documentation to calibrate with."""
    tokenizer = loaded(name).tokenizer
    if part == "calibration":
        return documentation.windows(documentation.tokens(tokenizer, part), count, length, generator)
    half = PARAGRAPHS[: count // 2] if part == "validation" else PARAGRAPHS[count // 2 :]
    return torch.tensor([tokenizer(text).input_ids[:length] for text in half])


# Decoders ----------------------------------------------------------------------------------------------------------


def all_tokens() -> Any:
    """Draws from the whole distribution."""
    return transformers().LogitsProcessorList()


def top_p(p: float = 0.9) -> Any:
    """Nucleus sampling: the most likely tokens that together have probability p."""
    require(0 <= p <= 1, "p", p, "within [0, 1]")  # of which transformers lets NaN pass
    return transformers().TopPLogitsWarper(p)


def top_k(k: int = 50) -> Any:
    """The k most likely tokens."""
    require_whole("k", k)
    return transformers().TopKLogitsWarper(k)


def min_p(p: float = 0.1) -> Any:
    """Tokens at least p times as likely as the most likely one."""
    return transformers().MinPLogitsWarper(p)


def greedy() -> Any:
    """Always the most likely token."""
    return transformers().TopKLogitsWarper(1)


DECODERS = (
    Method("Multinomial", "decoder", all_tokens),
    Method("TopP", "decoder", top_p, {"p": Uniform(0.5, 1.0)}),
    Method("TopK", "decoder", top_k, {"k": Integer(2, 500, log=True)}),
    Method("MinP", "decoder", min_p, {"p": Uniform(0.01, 0.3)}),
    Method("Greedy", "decoder", greedy),
)


def decoder_slot(default: Choice) -> Slot:
    """`transformers.LogitsProcessor`s, or functions `(model, input_ids, attention_mask, max_new_tokens, generator)`."""
    return Slot("decoder", default, Options(DECODERS, "decoder"))


def continued(trial: Trial, ids: Int[Tensor, "n t"]) -> Int[Tensor, "n u"]:
    """The tokens that are written after each row."""
    decoder, model, setting = trial.parts["decoder"], trial.model, trial.setting
    mask = torch.ones_like(ids)
    library = transformers()
    if isinstance(decoder, library.LogitsProcessor | library.LogitsProcessorList):
        own = decoder if isinstance(decoder, list) else [decoder]
        processors = library.LogitsProcessorList([library.TemperatureLogitsWarper(setting.temperature), *own])
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": NEW}
        made = model.generate(
            ids, attention_mask=mask, logits_processor=processors, max_new_tokens=NEW, pad_token_id=0, **options
        )
    else:
        made = decoder(model, ids, attention_mask=mask, max_new_tokens=NEW, generator=setting.generator)
    return made[:, ids.shape[1] :]  # type: ignore[no-any-return]


def generation(trial: Trial) -> tuple[float, dict[str, float], Costs]:
    """How far the written tokens are from people's in nats per token, and how varied they are."""
    beginnings, real = trial.passages[:, :BEGINNING], trial.passages[:, BEGINNING:]
    start = perf_counter()
    written = continued(trial, beginnings)
    seconds = (perf_counter() - start) / written.shape[1]
    sizes = lengths(written, end_tokens(trial.model, None))
    nats = surprise(trial, torch.cat([beginnings, written], 1), sizes)
    people = surprise(trial, trial.passages, lengths(real))
    if not nats.isfinite().all():
        raise Diverged("what was written has probability 0")
    figures = {
        "nats per token": nats.mean().item(),
        "people's nats per token": people.mean().item(),
        "distinct pairs": distinct(written, sizes, 2),
        "repeated fours": 1 - distinct(written, sizes, 4),
    }
    return abs(figures["nats per token"] - figures["people's nats per token"]), figures, Costs(step_time=seconds)


def lengths(written: Int[Tensor, "n t"], ends: Int[Tensor, " e"] | None = None) -> Int[Tensor, " n"]:
    """How many tokens of each row belong to its text: those up to the first that ends it, or all."""
    ended = torch.zeros_like(written) if ends is None else torch.isin(written, ends).int()
    return (ended.cumsum(1) - ended == 0).sum(1)


def surprise(trial: Trial, ids: Int[Tensor, "n t"], sizes: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Mean nats of each row's tokens after the beginning, under the model as it is."""
    logits = trial.model(ids).logits[:, BEGINNING - 1 : -1]
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, BEGINNING:].flatten(), reduction="none").view(len(ids), -1)
    there = torch.arange(nats.shape[1]) < sizes[:, None]
    return nats.where(there, 0).sum(1) / sizes


def distinct(ids: Int[Tensor, "n t"], sizes: Int[Tensor, " n"], size: int) -> float:
    """The mean over rows of the share of runs of that many tokens that are different; 1 for rows without a run."""
    shares = [1.0] * len(ids)
    for place, (row, length) in enumerate(zip(ids, sizes.tolist(), strict=True)):
        if length >= size:
            runs = row[:length].unfold(0, size, 1)
            shares[place] = len(runs.unique(dim=0)) / len(runs)
    return sum(shares) / len(shares)


smollm2_generation = TrainedTask(
    name="smollm2-generation",
    version=1,
    metric=Metric("distance from people's likelihood", "minimize", "nats per token", margin=0.1, worst=10.8),
    measure=generation,
    slots={"decoder": decoder_slot(Choice("Multinomial"))},
    model="smollm2",
    passages=len(PARAGRAPHS),
    length=BEGINNING + NEW,
    text=paragraphs,
)
