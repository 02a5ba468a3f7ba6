"""The claims of the Mann-Whitney loss: pooled AUC with no loss in ranking, and offsets of queries.

Made-up retrieval instead of question answering with language models. A passage is a random point in 16 dimensions, its
query a noisy copy; queries come in six clusters that differ in how noisy and, by a direction that all of a cluster's
queries share, in how similar they are to passages at large. Encoders see both through fixed random networks. Both
losses have the same eight settings to choose among on validation data, by the metric that the claim is about.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above
from fairtrial.contract import Split
from fairtrial.methods.losses.mw_loss import InBatchContrastiveLoss, MannWhitneyLoss, pooled_auc
from fairtrial.tasks.streams import Streams

CONTRASTIVE, MANN_WHITNEY = "contrastive", "Mann-Whitney"
LOSSES: dict[str, type[InBatchContrastiveLoss | MannWhitneyLoss]] = {
    CONTRASTIVE: InBatchContrastiveLoss,
    MANN_WHITNEY: MannWhitneyLoss,
}
TEMPERATURES, RATES = (0.01, 0.05, 0.1, 0.3), (1e-3, 5e-3)
LATENT, SEEN, EMBEDDING = 16, 64, 32
SPREADS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
PAIRS, JUDGED, HARDEST = 2000, 500, 50
STEPS, BATCH, TUNING_SEEDS, SEEDS = 400, 64, 2, 10
OFFSETS, DRAWS, QUERIES, CANDIDATES, OFFSET_TEMPERATURE = (0.0, 1.0, 3.0, 10.0, 30.0), 20, 64, 64, 0.1


def check(measure: Measure) -> list[Finding]:
    return [_area(measure), _offsets(measure)]


@dataclass(frozen=True)
class Setting:
    """A loss with its temperature, and the learning rate."""

    loss: str
    temperature: float
    lr: float


class Quality(NamedTuple):
    """Pooled area over the hardest passages of each query, and mean reciprocal rank within the first ten."""

    area: float
    mrr: float


def _area(measure: Measure) -> Finding:
    grids = {loss: [Setting(loss, t, lr) for t in TEMPERATURES for lr in RATES] for loss in LOSSES}
    chosen = tune(measure, quality, grids, seeds=TUNING_SEEDS, score=lambda found: found.area)
    found = evaluate(measure, quality, chosen, seeds=SEEDS)
    area = {loss: [of_seed.area for of_seed in values] for loss, values in found.items()}
    mrr = {loss: [of_seed.mrr for of_seed in values] for loss, values in found.items()}
    gain, change = (gaps(values[MANN_WHITNEY], values[CONTRASTIVE]) for values in (area, mrr))
    (better,) = above_zero(gain)
    says: Verdict = "reproduced" if better and surely_above(change, -0.02) else "partly" if better else "not reproduced"
    settings = "; ".join(f"{loss}: {setting.temperature:g}, rate {setting.lr:g}" for loss, setting in chosen.items())
    return Finding(
        claim="pooled-auc",
        verdict=says,
        criterion="The area under the ROC curve pooled over queries, each with its 50 hardest passages, is "
        "significantly larger with the Mann-Whitney loss (paired sign-flip test), and the 95 % interval of the change "
        "in MRR@10 lies above -0.02; partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"pooled AUC, {loss}", values, "fraction", paper=paper)
                for (loss, values), paper in zip(
                    area.items(), ("0.67 on NLI, MiniLM", "0.81 on NLI, MiniLM"), strict=True
                )
            ),
            *(
                measured(f"MRR@10, {loss}", values, "mean reciprocal rank", paper=paper)
                for (loss, values), paper in zip(mrr.items(), ("0.52 on average", "0.53 on average"), strict=True)
            ),
            measured("gain in pooled AUC", gain, "fraction", paper="0.14 on NLI"),
            measured("change in MRR@10", change, "mean reciprocal rank", paper="0.01 on average"),
        ),
        note=f"Temperature and learning rate by validation: {settings}. The paper takes 500 passages a query.",
    )


class Pairs(NamedTuple):
    """What encoders see of queries and of their passages."""

    query: Tensor
    passage: Tensor


def pairs(seed: int) -> dict[str, Pairs]:
    """Pairs to train on, to validate with and for the test, through the same random networks."""
    generator = Streams(seed)("pairs")
    networks = [
        [torch.randn(*shape, generator=generator) for shape in ((LATENT, SEEN), (SEEN, SEEN))] for _ in range(2)
    ]
    directions = torch.randn(len(SPREADS), LATENT, generator=generator)
    parts = {}
    for part, count in (("training", PAIRS), ("validation", JUDGED), ("test", JUDGED)):
        passage = torch.randn(count, LATENT, generator=generator)
        cluster = torch.randint(len(SPREADS), (count,), generator=generator)
        noise = torch.tensor(SPREADS)[cluster, None] * torch.randn(count, LATENT, generator=generator)
        query = passage + noise + 0.5 * directions[cluster]
        seen = [
            torch.tanh(latent @ first / LATENT**0.5) @ second / SEEN**0.5
            for latent, (first, second) in zip((query, passage), networks, strict=True)
        ]
        parts[part] = Pairs(*seen)
    return parts


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(SEEN, 128), nn.ReLU(), nn.Linear(128, EMBEDDING))


def quality(run: Run[Setting]) -> Quality:
    """Train two towers on the seed's own pairs, and judge them."""
    setting, streams, data = run.setting, Streams(run.seed), pairs(run.seed)
    with streams.globally("model"):
        towers = nn.ModuleList([tower(), tower()])
    loss = LOSSES[setting.loss](setting.temperature)
    optimizer = torch.optim.AdamW(towers.parameters(), setting.lr)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    order = streams("order")
    for _ in range(STEPS):
        batch = torch.randint(PAIRS, (BATCH,), generator=order)
        value: Tensor = loss(*(tower(seen[batch]) for tower, seen in zip(towers, data["training"], strict=True)))
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        schedule.step()
    return judged(towers, data, run.split)


@torch.no_grad()
def judged(towers: nn.ModuleList, data: dict[str, Pairs], split: Split) -> Quality:
    """Pooled area over the own and the hardest other passages of each query, and MRR@10 among all passages."""
    query, passage = (F.normalize(tower(seen), dim=1) for tower, seen in zip(towers, data[split], strict=True))
    scores = query @ passage.T
    positive = scores.diagonal()[:, None]
    own = torch.eye(len(scores), dtype=torch.bool)
    hardest = scores.masked_fill(own, -torch.inf).topk(HARDEST, dim=1).values
    together = torch.cat([positive, hardest], 1)
    mask = torch.zeros_like(together, dtype=torch.bool)
    mask[:, 0] = True
    rank = (scores >= positive).sum(1)
    return Quality(pooled_auc(together, mask), torch.where(rank <= 10, 1.0 / rank, 0.0).double().mean().item())


class Shifted(NamedTuple):
    """What offsets of one size leave of both losses and of the area."""

    contrastive: float
    mann_whitney: float
    area: float


def _offsets(measure: Measure) -> Finding:
    found = measure.map(shifted, range(DRAWS))
    without = [draw[0] for draw in found]
    contrastive = [max(abs(value.contrastive - draw[0].contrastive) for value in draw) for draw in found]
    unchanged = max(contrastive) < 1e-9
    area = {offset: [draw[place].area for draw in found] for place, offset in enumerate(OFFSETS)}
    rises = all(draw[-1].mann_whitney > draw[0].mann_whitney for draw in found)
    least, intact = fmean(area[OFFSETS[-1]]), fmean(value.area for value in without)
    says: Verdict = (
        "not reproduced" if not (unchanged and rises) or least >= intact else "reproduced" if least < 0.6 else "partly"
    )
    return Finding(
        claim="query-offsets",
        verdict=says,
        criterion="Offsets of the rows change the contrastive loss by less than 1e-9 in every draw, while the "
        "Mann-Whitney loss rises in every draw and the mean pooled AUC falls below 0.6 at the largest offsets; partly "
        "if it falls less.",
        seeds=tuple(range(DRAWS)),
        measurements=(
            *(
                measured(f"pooled AUC, offsets of size {offset:g}", values, "fraction")
                for offset, values in area.items()
            ),
            *(
                measured(
                    f"Mann-Whitney loss, offsets of size {offset:g}", [draw[place].mann_whitney for draw in found], ""
                )
                for place, offset in enumerate(OFFSETS)
            ),
            measured("largest change of the contrastive loss", contrastive, ""),
        ),
        note=f"{QUERIES} queries with a positive that stands 1 above {CANDIDATES - 1} negatives, whose standard "
        "deviation is 0.3; normal offsets; temperature 0.1; float64.",
    )


def shifted(seed: int) -> list[Shifted]:
    """Both losses and the area at every size of the offsets."""
    generator = Streams(seed)("scores")
    scores = 0.3 * torch.randn(QUERIES, CANDIDATES, generator=generator, dtype=torch.float64)
    mask = torch.zeros(QUERIES, CANDIDATES, dtype=torch.bool)
    mask[:, 0] = True
    scores[:, 0] += 1.0
    offsets = torch.randn(QUERIES, 1, generator=generator, dtype=torch.float64)
    found = []
    for size in OFFSETS:
        moved = scores + size * offsets
        found.append(
            Shifted(
                InBatchContrastiveLoss(OFFSET_TEMPERATURE).of_scores(moved, mask).item(),
                MannWhitneyLoss(OFFSET_TEMPERATURE).of_scores(moved, mask).item(),
                pooled_auc(moved, mask),
            )
        )
    return found
