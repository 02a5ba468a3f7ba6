"""Just one byte: fine-tuning over several machines that send scalars only (Zelikman et al. 2023, arXiv:2306.10015).

All machines hold the same weights θ. In round t machine k perturbs its copy along the direction z of a seed made from
(t, j, k) for its sample j, measures the slope of the loss on data of its own, restores θ, and sends nothing but the
slope, as a byte. Everybody can make every direction from its seed, and takes the same step,

    g = [L(θ + εz) - L(θ - εz)] / 2ε,    θ ← θ - lr Σ g z / √n    over the n slopes of the round,

machines in ascending order, and samples in ascending order within each, so that the copies stay equal bit for bit: on
machines whose arithmetic is the same. A copy that joins late, or was lost, follows from the initial weights and the log
of slopes.

The division by √n is that of the authors' code, a step along the mean with the rate lr √n; `reduction='mean'` divides
by n. A slope is sent as a sign and a rounded logarithm, `LogCodec`. The authors' rounding, to 255 powers and a sign,
needs 9 bits, and their code sends the unrounded number. With 8 bits, the default here, it is a byte, and one of the
codes is left for a slope of 0. Seeds are hashed instead of written in decimal digits. Left out are what the authors'
code can do besides: steps ε that are drawn at random, backups every 16 rounds, and a check of hashes every 64, all of
them against round-off, which does not build up here, since θ is restored from a copy.

Messages are bytes; how they travel is left to the caller. A slope tells something about the data that it was measured
on.
"""

import copy
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.mezo import direction_seed, perturb_, spsa_projected_grad

HEADER = struct.Struct("<II")  # of a message: round and worker


@dataclass(frozen=True)
class LogCodec:
    """A number as its sign and its rounded logarithm, in a fixed number of bits; 0 has a code of its own.

        p = clip(round(ln|g| / h), -P, P),    P = 2^(bits-2) - 1,    g ≈ sign(g) exp(h p)

    Within exp(± h P) the relative error is at most exp(h/2) - 1, 6.5 % for a byte; numbers beyond are brought to the
    ends of the range, 3.8e-4 and 2630 for a byte. NaN and infinities become 0, so that such a slope moves nothing.

    Args:
        bits: 2 to 16; 9 with the default step is the authors' form.
        step: h, above 0 and at most 700 / P; 2^(5-bits) by default, which keeps the range nearly the same whatever
            the bits.
    """

    bits: int = 8
    step: float | None = None

    def __post_init__(self) -> None:
        require(self.bits in range(2, 17), "bits", self.bits, "a whole number within 2..16")
        if self.step is None:
            object.__setattr__(self, "step", 2.0 ** (5 - self.bits))
        largest = 700.0 / max(1, self.largest_power)  # exp of more is no float
        require(0 < self.h <= largest, "step", self.step, f"above 0 and at most {largest:.4g}")

    @property
    def h(self) -> float:
        return float(self.step or 0.0)

    @property
    def n_bits(self) -> int:
        """Bits that a number takes."""
        return self.bits

    @property
    def n_bytes(self) -> int:
        """Bytes that a number is sent in: 1 up to 8 bits, else 2."""
        return 1 if self.bits <= 8 else 2

    @property
    def largest_power(self) -> int:
        """P."""
        return int(2 ** (self.bits - 2)) - 1

    def encode(self, number: float) -> bytes:
        code = 0
        if math.isfinite(number) and number != 0:
            P = self.largest_power
            p = max(-P, min(P, round(math.log(abs(number)) / self.h)))
            code = 1 + p + P + (2 * P + 1) * (number < 0)
        return code.to_bytes(self.n_bytes, "little")

    def decode(self, data: bytes) -> float:
        P, code = self.largest_power, int.from_bytes(data, "little")
        known = len(data) == self.n_bytes and code <= 2 * (2 * P + 1)
        require(known, "data", data, f"{self.n_bytes} byte(s) as encode makes them")
        if code == 0:
            return 0.0
        negative, place = divmod(code - 1, 2 * P + 1)
        return (-1.0 if negative else 1.0) * math.exp(self.h * (place - P))


@dataclass(frozen=True)
class FloatCodec:
    """A number as a float32, for comparison; what is not finite becomes 0."""

    @property
    def n_bits(self) -> int:
        return 32

    @property
    def n_bytes(self) -> int:
        return 4

    def encode(self, number: float) -> bytes:
        largest = torch.finfo(torch.float32).max
        return struct.pack("<f", max(-largest, min(largest, number)) if math.isfinite(number) else 0.0)

    def decode(self, data: bytes) -> float:
        require(len(data) == 4, "data", data, "4 bytes")
        return float(struct.unpack("<f", data)[0])


Codec = LogCodec | FloatCodec


class Message(NamedTuple):
    """What a worker sends in a round: its slopes, one after the other, sample 0 first."""

    round: int
    worker: int
    payload: bytes

    def to_bytes(self) -> bytes:
        """Round and worker in 4 bytes each, then the payload."""
        return HEADER.pack(self.round, self.worker) + self.payload

    @classmethod
    def from_bytes(cls, data: bytes) -> "Message":
        require(len(data) >= HEADER.size, "data", data, f"at least {HEADER.size} bytes")
        round, worker = HEADER.unpack_from(data)
        return cls(round, worker, data[HEADER.size :])


def step_lengths(slopes: Sequence[float], lr: float, reduction: str = "sqrt") -> list[float]:
    """How far each of a round's slopes moves θ along its direction: -lr g / √n, or -lr g / n for 'mean'."""
    n = len(slopes)
    scale = {"sqrt": n**0.5, "mean": n}[reduction]
    return [-lr * slope / scale for slope in slopes]


def take_round_(
    params: Sequence[Tensor],
    slopes: Sequence[tuple[int, Sequence[float]]],
    *,
    round: int,
    run_seed: int,
    lr: float,
    reduction: str = "sqrt",
) -> None:
    """Take the step of a round, in place.

    Args:
        params: θ, in the order of `model.parameters()`.
        slopes: the workers in ascending order, each with the slopes of its samples.
        round: t, which with `run_seed`, the sample and the worker makes the seed of a direction.
        run_seed: of the run.
        lr: learning rate.
        reduction: 'sqrt' or 'mean'.
    """
    places = [(j, worker) for worker, own in slopes for j in range(len(own))]
    lengths = step_lengths([slope for _, own in slopes for slope in own], lr, reduction)
    for (j, worker), length in zip(places, lengths, strict=True):
        if length:
            perturb_(params, direction_seed(run_seed, round, j, worker), length)


@dataclass
class ReplayLog:
    """What a run has sent, from which everybody can rebuild its weights: `replay(model, log)`.

    Attributes:
        run_seed, reduction, codec: as of the workers.
        rounds: for each round its number, its learning rate, and the payload of every worker.
    """

    run_seed: int
    reduction: str
    codec: Codec
    rounds: list[tuple[int, float, dict[int, bytes]]] = field(default_factory=list)

    def append(self, round: int, lr: float, messages: Iterable[Message]) -> None:
        payloads = {message.worker: message.payload for message in sorted(messages, key=lambda m: m.worker)}
        self.rounds.append((round, lr, payloads))

    def to_jsonl(self) -> str:
        """One JSON object a line: the run first, then its rounds."""
        codec = {} if isinstance(self.codec, FloatCodec) else {"bits": self.codec.bits, "step": self.codec.step}
        lines: list[dict[str, Any]] = [{"run_seed": self.run_seed, "reduction": self.reduction, "codec": codec}]
        for round, lr, payloads in self.rounds:
            sent = {str(worker): payload.hex() for worker, payload in payloads.items()}
            lines.append({"round": round, "lr": lr, "sent": sent})
        return "".join(json.dumps(line) + "\n" for line in lines)

    @classmethod
    def from_jsonl(cls, text: str) -> "ReplayLog":
        """The log that `to_jsonl` has written.

        Raises:
            ValueError: the text is not one.
        """
        try:
            first, *rest = map(json.loads, text.splitlines())
            codec = LogCodec(**first["codec"]) if first["codec"] else FloatCodec()
            rounds = [
                (line["round"], line["lr"], {int(worker): bytes.fromhex(sent) for worker, sent in line["sent"].items()})
                for line in rest
            ]
            return cls(first["run_seed"], first["reduction"], codec, rounds)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"text must be a log of to_jsonl, got {text[:60]!r}") from error


def replay(model: nn.Module, log: ReplayLog) -> nn.Module:
    """Bring a model from the initial weights to those at the end of a log, in place."""
    params = list(model.parameters())
    for round, lr, payloads in log.rounds:
        slopes = [(worker, unpack(payloads[worker], log.codec)) for worker in sorted(payloads)]
        take_round_(params, slopes, round=round, run_seed=log.run_seed, lr=lr, reduction=log.reduction)
    return model


def unpack(payload: bytes, codec: Codec) -> list[float]:
    """The slopes in a payload."""
    whole = len(payload) % codec.n_bytes == 0
    require(whole, "payload", payload, f"numbers of {codec.n_bytes} byte(s)")
    return [codec.decode(payload[i : i + codec.n_bytes]) for i in range(0, len(payload), codec.n_bytes)]


class SharedRandomnessWorker:
    """A machine of the cluster: it measures slopes on its own data and takes everybody's steps.

    In every round `propose` first, then `apply` all messages, its own among them. The parameters perturbed and trained
    are all of `model.parameters()`. The model is put into evaluation mode, since dropout would draw at random.

    Args:
        model: its copy of the model, trained in place.
        worker_id: k, within [0, 2³²) and unique in the cluster.
        loss: `loss(model, batch)` gives a number or a tensor with one element.
        workers: the ids of all that messages are accepted from, itself included; whoever has none of them is not of
            the cluster. Not all need to take part in every round.
        eps: ε, above 0.
        lr: learning rate, at least 0; may be changed between rounds, at all workers alike.
        codec: how slopes are sent: `LogCodec(bits)`, or `FloatCodec()`.
        reduction: 'sqrt' divides the sum over a round's n slopes by √n, 'mean' by n.
        run_seed: of the run, the same at all workers.

    Attributes:
        round: t, the round to come.

    The defaults are those of the authors' script, for GPT-2; much smaller rates are needed for larger models.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        worker_id: int,
        loss: Callable[[nn.Module, Any], Any],
        *,
        workers: Iterable[int],
        eps: float = 1e-3,
        lr: float = 0.1,
        codec: Codec | None = None,
        reduction: str = "sqrt",
        run_seed: int = 0,
    ) -> None:
        self.workers = frozenset(workers)
        require(worker_id in self.workers, "worker_id", worker_id, f"one of workers, {sorted(self.workers)}")
        require(0 < eps < math.inf, "eps", eps, "above 0 and finite")
        require(0 <= lr < math.inf, "lr", lr, "at least 0 and finite")
        require(reduction in ("sqrt", "mean"), "reduction", reduction, "'sqrt' or 'mean'")
        direction_seed(run_seed, *self.workers)  # refuses what cannot be part of a seed
        self.model, self.worker_id, self.loss = model.eval(), worker_id, loss
        self.eps, self.lr, self.reduction, self.run_seed = eps, lr, reduction, run_seed
        self.codec = LogCodec() if codec is None else codec
        self.round = 0

    def propose(self, batches: Iterable[Any]) -> Message:
        """The slopes of the loss on each batch, sample j of this round, as a message. The weights stay as they are."""
        slopes = [self._slope(j, batch) for j, batch in enumerate(batches)]
        return Message(self.round, self.worker_id, b"".join(map(self.codec.encode, slopes)))

    def _slope(self, j: int, batch: Any) -> float:
        params, seed = list(self.model.parameters()), direction_seed(self.run_seed, self.round, j, self.worker_id)
        return spsa_projected_grad(params, lambda: self.loss(self.model, batch), seed, self.eps, exact_restore=True)

    def apply(self, messages: Iterable[Message]) -> None:
        """Take the step of the round, from the messages of all workers in any order, and go on to the next round.

        Raises:
            ValueError: a message is of another round, of an unknown worker or damaged, or a worker has sent two;
                nothing has changed then.
        """
        slopes: dict[int, list[float]] = {}
        for message in messages:
            require(message.round == self.round, "round", message.round, f"{self.round}, the present one")
            require(message.worker in self.workers, "worker", message.worker, f"one of {sorted(self.workers)}")
            require(message.worker not in slopes, "worker", message.worker, "only once in a round")
            slopes[message.worker] = unpack(message.payload, self.codec)
        take_round_(
            list(self.model.parameters()),
            sorted(slopes.items()),
            round=self.round,
            run_seed=self.run_seed,
            lr=self.lr,
            reduction=self.reduction,
        )
        self.round += 1


class InProcessCluster:
    """Workers in one process, each with its own copy of a model, and the log of what they send: for trials.

    Args:
        model: the initial weights; copied for every worker, and kept.
        n_workers: how many, with ids from 0.
        loss, eps, lr, codec, reduction, run_seed: as of `SharedRandomnessWorker`.

    Attributes:
        workers: the workers, in order of their ids.
        log: the `ReplayLog` of the rounds so far.
        payload_bytes: bytes of slopes that were sent, each message counted once.
        header_bytes: bytes that say of which round and worker a message is.
    """

    def __init__(self, model: nn.Module, n_workers: int, loss: Callable[[nn.Module, Any], Any], **options: Any) -> None:
        require(n_workers >= 1, "n_workers", n_workers, "at least 1")
        self.initial, self.loss, self.options = copy.deepcopy(model), loss, options
        self.workers = [
            SharedRandomnessWorker(copy.deepcopy(model), k, loss, workers=range(n_workers), **options)
            for k in range(n_workers)
        ]
        first = self.workers[0]
        self.log = ReplayLog(first.run_seed, first.reduction, first.codec)
        self.payload_bytes = self.header_bytes = 0

    def take_round(self, batches: Sequence[Iterable[Any]]) -> None:
        """A round in which worker k measures a slope on each of `batches[k]`."""
        messages = [worker.propose(own) for worker, own in zip(self.workers, batches, strict=True)]
        for worker in self.workers:
            worker.apply(messages)
        self.log.append(messages[0].round, self.workers[0].lr, messages)
        self.payload_bytes += sum(len(message.payload) for message in messages)
        self.header_bytes += HEADER.size * len(messages)

    def late_joiner(self) -> nn.Module:
        """A copy that was not there, brought up to date from the initial weights and the log."""
        return replay(copy.deepcopy(self.initial), self.log).eval()
