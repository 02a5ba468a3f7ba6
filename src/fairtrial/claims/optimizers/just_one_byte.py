"""The claims of the note on one byte per gradient: bytes do, workers help, and replicas agree.

A perceptron of 9610 weights on digits instead of GPT-2 on SST-2, trained from scratch. In every round each worker
measures one slope, on a batch of its own. Learning rates, with the authors' division by √n, are the best of four by
the loss on validation data, over two tuning seeds. As copies of the weights stay equal, the runs keep one for all
workers; that they do stay equal is measured with as many copies as workers.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, relative_gaps, surely_below
from fairtrial.methods.optimizers.just_one_byte import FloatCodec, InProcessCluster, LogCodec, take_round_
from fairtrial.methods.optimizers.mezo import direction_seed, spsa_projected_grad
from fairtrial.tasks.digits import samples
from fairtrial.tasks.samples import Part, divide
from fairtrial.tasks.streams import Streams

BATCH, ROUNDS, EPS = 64, 400, 1e-3
WORKERS, OTHER_BITS = (1, 2, 4, 8), (9, 4)
RATES, FIRST_ORDER_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2), (0.03, 0.1, 0.3, 1.0)
TUNING_SEEDS, SEEDS = 2, 8
LEARNT = 2.0  # nats; guessing gives 2.3
DIVERGED = 10 * math.log(10)  # the loss that a run counts with at most: ten times that of guessing
EQUAL_WORKERS, EQUAL_ROUNDS = 4, 100


def check(measure: Measure) -> list[Finding]:
    losses, note = _trained(measure)
    return [_one_byte(losses, note), _workers(losses, note), _replicas(measure)]


@dataclass(frozen=True)
class Arm:
    """How many workers, and the bits that each sends for a slope; 0 bits for the mean of gradients in float32."""

    workers: int
    bits: int

    def __str__(self) -> str:
        sent = "first-order gradients" if not self.bits else "floats" if self.bits == 32 else f"{self.bits} bits"
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}, {sent}"

    @property
    def codec(self) -> LogCodec | FloatCodec:
        return FloatCodec() if self.bits == 32 else LogCodec(self.bits)


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate."""

    arm: Arm
    lr: float


FIRST_ORDER = Arm(4, 0)
Losses = dict[Arm, list[float]]


def arms() -> list[Arm]:
    slopes = [Arm(workers, bits) for workers in WORKERS for bits in (32, 8)]
    return [*slopes, *(Arm(4, bits) for bits in OTHER_BITS), FIRST_ORDER]


def _trained(measure: Measure) -> tuple[Losses, str]:
    grids = {arm: [Setting(arm, lr) for lr in (RATES if arm.bits else FIRST_ORDER_RATES)] for arm in arms()}
    chosen = tune(measure, loss_of, grids, seeds=TUNING_SEEDS, score=lambda loss: -loss)
    rates = "; ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    return evaluate(measure, loss_of, chosen, seeds=SEEDS), f"{ROUNDS} rounds. Learning rates: {rates}."


def _one_byte(losses: Losses, note: str) -> Finding:
    above = {workers: relative_gaps(losses[Arm(workers, 8)], losses[Arm(workers, 32)]) for workers in WORKERS}
    learnt = all(surely_below(losses[Arm(workers, 32)], LEARNT) for workers in WORKERS)
    within = {bound: learnt and all(surely_below(found, bound) for found in above.values()) for bound in (0.01, 0.05)}
    says: Verdict = "reproduced" if within[0.01] else "partly" if within[0.05] else "not reproduced"
    others = [Arm(4, bits) for bits in OTHER_BITS]
    return Finding(
        claim="one-byte-suffices",
        verdict=says,
        criterion="With 1, 2, 4 and 8 workers, the test loss after the last round with 8-bit slopes is less than 1 % "
        "above that with float32 slopes, by the upper end of the 95 % interval of the mean paired difference, and that "
        f"is below {LEARNT:g} nats; partly if less than 5 % above.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"loss with 8 bits above that with floats, {workers} workers", found, "part of the latter")
                for workers, found in above.items()
            ),
            *(
                measured(
                    f"loss with {arm.bits} bits above that with floats, {arm.workers} workers",
                    relative_gaps(losses[arm], losses[Arm(4, 32)]),
                    "part of the latter",
                )
                for arm in others
            ),
            *(measured(f"test loss, {arm}", found, "nats") for arm, found in losses.items()),
            *(
                single(f"bytes sent in the run, {arm}", arm.workers * ROUNDS * arm.codec.n_bytes, "bytes")
                for arm in losses
                if arm.bits
            ),
            single(f"bytes sent in the run, {FIRST_ORDER}", FIRST_ORDER.workers * ROUNDS * 4 * weights(), "bytes"),
        ),
        note=f"{note} Bytes of slopes or gradients; the number of round and worker comes on top, 8 bytes a message. "
        "9 bits are what the authors' rounding needs; their code sends floats.",
    )


def _workers(losses: Losses, note: str) -> Finding:
    pairs = [*pairwise(WORKERS), (WORKERS[0], WORKERS[-1])]
    falls = {pair: gaps(losses[Arm(pair[0], 32)], losses[Arm(pair[1], 32)]) for pair in pairs}
    *doublings, all_together = above_zero(*falls.values())
    says: Verdict = "reproduced" if all(doublings) else "partly" if all_together else "not reproduced"
    return Finding(
        claim="workers-help",
        verdict=says,
        criterion="With float32 slopes, the test loss after the last round falls significantly with each doubling of "
        "the workers from 1 to 8 (paired sign-flip tests, Holm over the three doublings and 8 against 1); partly if 8 "
        "workers have a significantly lower one than 1.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"test loss, {Arm(workers, 32)}", losses[Arm(workers, 32)], "nats") for workers in WORKERS),
            *(measured(f"fall of the loss from {a} to {b} workers", found, "nats") for (a, b), found in falls.items()),
            measured(f"test loss, {FIRST_ORDER}", losses[FIRST_ORDER], "nats"),
        ),
        note=note,
    )


def _replicas(measure: Measure) -> Finding:
    measure.say("running a cluster with copies")
    differences, moved, payload, header = replica_differences()
    largest = max(differences.values())
    says: Verdict = "reproduced" if largest == 0 else "partly" if largest <= 1e-6 else "not reproduced"
    return Finding(
        claim="replicas-agree",
        verdict=says,
        criterion=f"After {EQUAL_ROUNDS} rounds with {EQUAL_WORKERS} workers, each with weights of its own, all copies "
        "and one rebuilt from the initial weights and the log agree bit for bit; partly if to 1e-6.",
        seeds=(0,),
        measurements=(
            *(
                single(f"largest difference from the first copy, {name}", value, "")
                for name, value in differences.items()
            ),
            single("largest change of a weight since the start", moved, ""),
            single("bytes of slopes sent", payload, "bytes"),
            single("bytes of round and worker numbers sent", header, "bytes"),
        ),
        note="One process of one machine: on machines whose arithmetic differs, copies would drift apart.",
    )


def perceptron() -> nn.Module:
    """64-128-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def weights() -> int:
    return sum(p.numel() for p in perceptron().to("meta").parameters())


def loss_on(model: nn.Module, part: Part) -> Tensor:
    return F.cross_entropy(model(part.x), part.y)


def batches(part: Part, streams: Streams, worker: int) -> Iterator[Part]:
    """A worker's own batches, drawn at random."""
    generator = streams(f"data of worker {worker}")
    while True:
        index = torch.randint(len(part.x), (BATCH,), generator=generator)
        yield Part(part.x[index], part.y[index])


def loss_of(run: Run[Setting]) -> float:
    """Train for all rounds, and give the loss on held-out data, `DIVERGED` where it is not below that."""
    arm, lr, streams = run.setting.arm, run.setting.lr, Streams(run.seed)
    division = divide(samples(), 0.2, "all", streams)
    with streams.globally("model"):
        model = perceptron()
    own = [batches(division.training, streams, worker) for worker in range(arm.workers)]
    for t in range(ROUNDS):
        if arm.bits:
            _slopes_round(model, own, arm, lr, t, run.seed)
        else:
            _gradients_round(model, own, lr)
    with torch.no_grad():
        loss = loss_on(model, getattr(division, run.split)).item()
    return loss if loss < DIVERGED else DIVERGED


def _slopes_round(model: nn.Module, own: list[Iterator[Part]], arm: Arm, lr: float, t: int, run_seed: int) -> None:
    params, codec, slopes = list(model.parameters()), arm.codec, []
    for worker, parts in enumerate(own):
        part, seed = next(parts), direction_seed(run_seed, t, 0, worker)
        slope = spsa_projected_grad(params, lambda part=part: loss_on(model, part), seed, EPS, exact_restore=True)  # type: ignore[misc]
        slopes.append((worker, [codec.decode(codec.encode(slope))]))
    take_round_(params, slopes, round=t, run_seed=run_seed, lr=lr)


def _gradients_round(model: nn.Module, own: list[Iterator[Part]], lr: float) -> None:
    params: list[Tensor] = list(model.parameters())
    loss = torch.stack([loss_on(model, next(parts)) for parts in own]).mean()
    gradients = torch.autograd.grad(loss, params)
    with torch.no_grad():
        torch._foreach_add_(params, gradients, alpha=-lr)


def replica_differences() -> tuple[dict[str, float], float, int, int]:
    """Of copies and replay from the first copy; how far that has moved; bytes of slopes and of headers."""
    streams = Streams(0)
    division = divide(samples(), 0.2, "all", streams)
    with streams.globally("model"):
        model = perceptron()
    cluster = InProcessCluster(copy.deepcopy(model), EQUAL_WORKERS, loss_on, eps=EPS, lr=RATES[0])
    own = [batches(division.training, streams, worker) for worker in range(EQUAL_WORKERS)]
    for _ in range(EQUAL_ROUNDS):
        cluster.take_round([[next(parts)] for parts in own])
    first = _flat(cluster.workers[0].model)
    others = {f"copy {worker.worker_id + 1}": worker.model for worker in cluster.workers[1:]}
    others["rebuilt from the log"] = cluster.late_joiner()
    differences = {name: (_flat(other) - first).abs().max().item() for name, other in others.items()}
    return differences, (_flat(model) - first).abs().max().item(), cluster.payload_bytes, cluster.header_bytes


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
