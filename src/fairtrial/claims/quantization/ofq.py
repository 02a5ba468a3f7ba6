"""The claims of the OFQ paper: fewer weights oscillate, and accuracy at 2 bits is higher.

A vision transformer of two blocks of width 64 on digits, whose 8×8 pixels are 16 patches, instead of DeiT on ImageNet.
It is trained in float32, then with weights and activations of its blocks at 2 bits, and then for a third as long at a
tenth of the rate: every arm so, and the full set also with annealing in that phase. No teacher. Every arm has the best
of three learning rates on validation data.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, surely_above, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.quantization.ofq import (
    LSQActivation,
    OscillationTracker,
    QKReparamAttention,
    StatsQLinear,
    StatsQuantizer,
    anneal,
    statsq_linear,
)
from fairtrial.tasks.digits import samples
from fairtrial.tasks.measures import accuracy
from fairtrial.tasks.samples import Division, divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

LEARNED, STATISTICAL, FULL, ANNEALED = "learned scales", "StatsQ", "StatsQ and QKR", "StatsQ, QKR and CGA"
BITS, DIM, HEADS, DEPTH = 2, 64, 4, 2
RATES = (1e-3, 3e-3, 1e-2)
FLOAT_STEPS, STEPS, LAST_STEPS, WATCHED = 150, 240, 80, 60
TUNING_SEEDS, SEEDS = 1, 8
OFTEN, NEAR_ZERO, NOTHING = 0.005, 0.01, 0.01


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in RATES] for arm in (LEARNED, STATISTICAL, FULL)}
    chosen = tune(measure, trained, grids, seeds=TUNING_SEEDS, score=lambda found: found.accuracy)
    found = evaluate(measure, trained, chosen, seeds=SEEDS)
    rates = ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    return [_oscillation(found, rates), _accuracy(found, rates)]


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate."""

    arm: str
    lr: float


@dataclass(frozen=True)
class Trained:
    """What a run gives.

    Attributes:
        whole: accuracy in float32.
        before: share of weights that oscillate at the end of the training.
        accuracy, share: after the last phase.
        annealed_accuracy, annealed_share: after the last phase with annealing, for the full set.
    """

    whole: float
    before: float
    accuracy: float
    share: float
    annealed_accuracy: float = 0.0
    annealed_share: float = 1.0


def _oscillation(found: dict[str, list[Trained]], rates: str) -> Finding:
    before = {arm: [result.before for result in results] for arm, results in found.items()}
    share = {arm: [result.share for result in results] for arm, results in found.items()}
    share[ANNEALED] = [result.annealed_share for result in found[FULL]]
    by_scale, by_annealing = gaps(before[LEARNED], before[STATISTICAL]), gaps(share[FULL], share[ANNEALED])
    falls = above_zero(by_scale, by_annealing)
    still = surely_below(share[ANNEALED], NEAR_ZERO)
    says: Verdict = "reproduced" if all(falls) and still else "partly" if any(falls) else "not reproduced"
    return Finding(
        claim="oscillation",
        verdict=says,
        criterion="The share of weights with an oscillation frequency above 0.005 is significantly lower with "
        "statistical than with learned scales at the end of the training, and significantly lower with annealing than "
        "without at the end of the last phase (paired sign-flip tests, Holm over the two), where it is below 0.01 by "
        "the 95 % interval of the mean; partly if lower at one of the two.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"share at the end of the training, {arm}", values, "fraction")
                for arm, values in before.items()
            ),
            *(
                measured(f"share at the end of the last phase, {arm}", values, "fraction")
                for arm, values in share.items()
            ),
            measured(f"share, {LEARNED} above {STATISTICAL}", by_scale, "fraction"),
            measured("share, without annealing above with", by_annealing, "fraction"),
        ),
        note=f"Learning rates: {rates}. The frequency is a running mean with momentum 0.01 over the last {WATCHED} "
        "steps of a phase; with QKR the codes of the products count.",
    )


def _accuracy(found: dict[str, list[Trained]], rates: str) -> Finding:
    reached = {arm: [result.accuracy for result in results] for arm, results in found.items()}
    reached[ANNEALED] = [result.annealed_accuracy for result in found[FULL]]
    ahead, by_annealing = gaps(reached[ANNEALED], reached[LEARNED]), gaps(reached[ANNEALED], reached[FULL])
    better, ties = above_zero(ahead)[0], surely_above(ahead, -NOTHING)
    keeps = surely_above(by_annealing, -NOTHING)
    says: Verdict = "reproduced" if better and keeps else "partly" if (better or ties) and keeps else "not reproduced"
    return Finding(
        claim="low-bit-accuracy",
        verdict=says,
        criterion="The full set has a significantly higher test accuracy than learned scales (paired sign-flip test), "
        "and annealing loses less than 0.01 of it against equally many steps without (95 % interval of the mean paired "
        "difference); partly if the full set is less than 0.01 behind (likewise) and annealing loses as little.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("accuracy in float32", [result.whole for result in found[LEARNED]], "fraction", paper="0.7202"),
            *(
                measured(f"accuracy, {arm}", values, "fraction", paper="0.6433 for DeiT-T" if arm == ANNEALED else "")
                for arm, values in reached.items()
            ),
            measured(f"accuracy, full set above {LEARNED}", ahead, "fraction", paper="0.098 above earlier work"),
            measured("accuracy, with annealing above without", by_annealing, "fraction"),
        ),
        note=f"Learning rates: {rates}.",
    )


# The transformer ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return attended


class RoundedAttention(nn.Module):
    """Self-attention with queries, keys, values and attention weights rounded; its linear layers yet are not."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.projections, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.projections.load_state_dict({"weight": attention.in_proj_weight, "bias": attention.in_proj_bias})
        self.out.load_state_dict(attention.out_proj.state_dict())
        self.rounding = nn.ModuleList([LSQActivation(BITS), LSQActivation(BITS), LSQActivation(BITS)])
        self.shares = LSQActivation(BITS, signed=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.projections(x).chunk(3, -1)
        q, k, v = (
            rounding(part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for rounding, part in zip(self.rounding, parts, strict=True)
        )
        shares = self.shares(torch.softmax(q @ k.transpose(2, 3) * (DIM // HEADS) ** -0.5, -1))
        attended: Tensor = self.out((shares @ v).transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention: nn.Module = Attention()
        self.mlp_in, self.mlp_out = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        change: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + change


class VisionTransformer(nn.Module):
    """Scores from the mean over 16 patches of 2×2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, DIM), nn.Linear(DIM, 10)
        self.positions = nn.Parameter(0.02 * torch.randn(16, DIM))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(DEPTH))), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        tokens = self.blocks(self.patches(patches) + self.positions)
        scores: Tensor = self.head(self.norm(tokens).mean(1))
        return scores


def rounded(model: nn.Module, arm: str) -> nn.Module:
    """The model with the blocks' weights and activations rounded as the arm does."""
    for block in model.blocks:  # type: ignore[union-attr]
        inner = block.attention.inner
        qkr = QKReparamAttention.from_attention(inner, BITS, BITS) if arm == FULL else None
        block.attention = qkr or RoundedAttention(inner)
    statsq_linear(model, BITS, BITS, unsigned=("mlp_out",), skip=("patches", "head"))
    if arm == LEARNED:
        for layer in [m for m in model.modules() if isinstance(m, StatsQLinear)]:
            layer.weight_quantizer = LSQActivation(BITS, channels=layer.out_features, axis=0)
    return model


@torch.no_grad()
def codes_of(model: nn.Module) -> list[Tensor]:
    """The codes of each rounded matrix."""
    found = []
    for module in model.modules():
        if isinstance(module, StatsQLinear):
            found.append(_codes(module.weight_quantizer, module.weight))
        if isinstance(module, QKReparamAttention):
            found.append(_codes(module.product_quantizer, module.product().flatten(0, 1)))
            found.append(_codes(module.value_quantizer, module.value.weight))
    return found


def _codes(quantizer: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(quantizer, StatsQuantizer):
        return quantizer.codes(weight)
    levels: Tensor = quantizer(weight) / quantizer.get_parameter("step")[:, None]
    return levels.round()


def trained(run: Run[Setting]) -> Trained:
    """Train in float32, with rounding, and for the last phase; judge after that."""
    setting, streams = run.setting, Streams(run.seed)
    division = divide(samples(), 0.2, "all", streams)
    part = getattr(division, run.split)
    with streams.globally("model"):
        model: nn.Module = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fit(model, optimizer, division.training, streams, steps=FLOAT_STEPS)
    whole = accuracy(*predict(model, part))
    with streams.globally("layer"):
        model = rounded(copy.deepcopy(model), setting.arm)
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)
        before = _phase(model, optimizer, division, streams, STEPS)
        twin = copy.deepcopy(model)
        share = _last_phase(model, setting.lr, division, streams)
        reached = accuracy(*predict(model, part))
        if setting.arm != FULL:
            return Trained(whole, before, reached, share)
        annealed = _last_phase(twin, setting.lr, division, streams, annealed=True)
        return Trained(whole, before, reached, share, accuracy(*predict(twin, part)), annealed)
    except Diverged:
        return Trained(whole, 1.0, 0.0, 1.0)


def _last_phase(model: nn.Module, lr: float, division: Division, streams: Streams, *, annealed: bool = False) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * lr)
    if annealed:
        anneal(model, optimizer)
    return _phase(model, optimizer, division, streams.inside("last"), LAST_STEPS)


def _phase(
    model: nn.Module, optimizer: torch.optim.Optimizer, division: Division, streams: Streams, steps: int
) -> float:
    """Train at a constant rate; the share of weights that oscillate often."""
    trackers: list[OscillationTracker] = []

    def watch(step: int) -> None:
        if step > steps - WATCHED:
            codes = codes_of(model)
            if not trackers:
                trackers.extend(OscillationTracker() for _ in codes)
            for tracker, now in zip(trackers, codes, strict=True):
                tracker.update(now)

    constant = ConstantLR(optimizer, factor=1.0, total_iters=0)
    fit(model, optimizer, division.training, streams, steps=steps, schedule=constant, after=watch)
    frequencies = torch.cat([t.frequency.flatten() for t in trackers if t.frequency is not None])
    return (frequencies > OFTEN).double().mean().item()
