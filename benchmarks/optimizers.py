"""Steps of the registered optimizers on the tensors of a transformer, beside torch's foreach AdamW and peer packages.

    pip install --target PEERS --no-deps pytorch_optimizer==4.1.0 heavyball==3.2.1 galore-torch==1.0
    OMP_NUM_THREADS=2 python benchmarks/optimizers.py PEERS [NAME ...]

The transformer has 12 layers and 10 million parameters; its gradients are random. Optimizers are made as a task makes
them, peers with the same groups; names choose some of them. Each stands beside AdamW, and beside its peer, in turns of
one step each, who is first alternating: printed are the median milliseconds of a step and the median of the turns'
ratios to AdamW's, for a peer also that of ours to it, with the range of their middle half. What draws a projection
every so many steps does so twice in the turns; of what such a step takes more, every step is given the share that falls
on it at the optimizer's own interval. The first step of heavyball compiles for a while.

Then come the bytes that the optimizer keeps, and the most that were alive at once in a step with all that it comprises:
exact counts, without the parameters, their gradients, and scratch space inside of operations; heavyball's compiled step
cannot be watched. On a machine that others use, OMP_WAIT_POLICY=passive keeps threads from spinning while they wait for
one that does not run.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from side_by_side import seconds
from torch import Tensor, nn
from torch.optim import Optimizer

from fairtrial.methods.optimizers.state_size import optimizer_state_bytes
from fairtrial.methods.registry import Entry, index
from fairtrial.tasks.memory import PeakMemory

PEERS = {"pytorch_optimizer": "4.1.0", "heavyball": "3.2.1", "galore-torch": "1.0"}
WIDTH, LAYERS, TOKENS = 256, 12, 1024
TURNS, EVERY = 30, 15  # steps that are measured, and from one projection to the next
INTERVALS = {"update_gap", "update_proj_gap"}  # what optimizers call the latter


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.attention = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.feedforward = nn.ModuleList([nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)])


def transformer() -> nn.Module:
    """As it is made, with random gradients; what it computes does not matter here."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(TOKENS, WIDTH),
        *[Layer() for _ in range(LAYERS)],
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, TOKENS, bias=False),
    )
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model


def own(entry: Entry) -> Optimizer:
    method, model = entry.load(), transformer()
    generator = torch.Generator().manual_seed(0)
    bound = method.bind(SimpleNamespace(model=model, generator=generator, total_steps=2000))
    return method.factory(**{"params": model.parameters(), "lr": 1e-3, **bound})


def of_pytorch_optimizer(name: str) -> Callable[[Optimizer], Optimizer]:
    def make(like: Optimizer) -> Optimizer:
        return getattr(importlib.import_module("pytorch_optimizer"), name)(transformer().parameters(), lr=1e-3)

    return make


def orthograd(like: Optimizer) -> Optimizer:
    """Around AdamW as torch makes it, like ours."""
    base = torch.optim.AdamW(transformer().parameters(), 1e-3, weight_decay=0.0)
    return importlib.import_module("pytorch_optimizer").OrthoGrad(base)


def galore(like: Optimizer) -> Optimizer:
    """The authors' package, on the groups of ours."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for p in transformer().parameters():
        shapes.setdefault(tuple(p.shape), []).append(p)
    groups: list[dict[str, Any]] = []
    for group in like.param_groups:
        params = [shapes[tuple(p.shape)].pop() for p in group["params"]]
        groups.append({"params": params})
        if group["rank"] is not None:
            names = ("update_proj_gap", "scale", "proj_type")
            rank = round(group["rank"] * WIDTH) if isinstance(group["rank"], float) else group["rank"]
            groups[-1] |= {"rank": rank} | {name: group[name] for name in names}
    return importlib.import_module("galore_torch.adamw").AdamW(groups, lr=1e-3, no_deprecation_warning=True)


# who else has it, and how to make it like ours
PEERS_OF = {
    "AdamP": ("pytorch_optimizer", of_pytorch_optimizer("AdamP")),
    "SGDP": ("pytorch_optimizer", of_pytorch_optimizer("SGDP")),
    "DiffGrad": ("pytorch_optimizer", of_pytorch_optimizer("DiffGrad")),
    "OrthoGrad": ("pytorch_optimizer", orthograd),
    "Prodigy": ("pytorch_optimizer", of_pytorch_optimizer("Prodigy")),
    "GaLoreAdamW": ("galore-torch", galore),
}


def is_measured(entry: Entry) -> bool:
    """Neither optimizers of other packages, nor K-FAC, whose step needs what a backward pass leaves behind."""
    return not entry.module.endswith(".packages") and entry.name != "KFAC"


def adamw() -> Optimizer:
    return torch.optim.AdamW(transformer().parameters(), 1e-3, foreach=True)


def heavyball_adamw() -> Optimizer:
    return importlib.import_module("heavyball").AdamW(transformer().parameters(), lr=1e-3)


class Contestant(NamedTuple):
    name: str
    optimizer: Optimizer
    interval: int | None  # its own, in steps from one projection to the next


def contestant(name: str, optimizer: Optimizer) -> Contestant:
    """With projections as often as they are measured."""
    interval = None
    for group in optimizer.param_groups:
        for key in INTERVALS & group.keys():
            interval, group[key] = group[key], EVERY
    return Contestant(name, optimizer, interval)


def taken(contestants: Sequence[Contestant]) -> list[list[float]]:
    """Seconds of each one's step in every turn, after the turns of one interval."""
    rows: list[list[float]] = [[] for _ in contestants]
    given = [[(p, p.grad) for group in c.optimizer.param_groups for p in group["params"]] for c in contestants]
    for turn in range(-EVERY, TURNS):
        for place in sorted(range(len(contestants)), reverse=turn % 2 == 0):
            for p, grad in given[place]:  # heavyball takes them away
                p.grad = grad
            took = seconds(contestants[place].optimizer.step, 1)
            if turn >= 0:
                rows[place].append(took)
    return rows


def typical(values: Sequence[float], interval: int | None) -> tuple[float, float, float]:
    """The median over turns and its middle half, with the share of a projection that falls on each."""
    ordinary = [value for turn, value in enumerate(values) if turn % EVERY]
    low, middle, high = quantiles(ordinary, n=4)
    share = 0.0 if interval is None else (median(values[::EVERY]) - middle) / interval
    return low + share, middle + share, high + share


def peak(optimizer: Optimizer) -> int:
    """Bytes alive at once over the steps of an interval, beyond parameters and gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    given = sum(2 * p.numel() * p.element_size() for p in params)
    with PeakMemory([params, [p.grad for p in params], dict(optimizer.state)]) as memory:
        for _ in range(EVERY):
            optimizer.step()
    return memory.peak - given


def compare(contestants: Sequence[Contestant]) -> Iterator[str]:
    """A line for each but the first, which all stand beside; the third is the peer of the second."""
    rows = taken(contestants)
    for place, (name, optimizer, interval) in list(enumerate(contestants))[1:]:
        to_adamw = [a / b for a, b in zip(rows[place], rows[0], strict=True)]
        words = f"{name:<32} {1e3 * typical(rows[place], interval)[1]:7.1f} ms  {ratio(typical(to_adamw, interval))}"
        words += f"  keeps {optimizer_state_bytes(optimizer) / 2**20:6.1f} MB"
        words += "" if name.startswith("heavyball") else f"  at most {peak(optimizer) / 2**20:6.1f} MB"
        if place == 2:
            to_peer = [a / b for a, b in zip(rows[1], rows[2], strict=True)]
            words += f"  ours to it {ratio(typical(to_peer, interval))}"
        yield words


def ratio(found: tuple[float, float, float]) -> str:
    low, middle, high = found
    return f"{middle:5.2f} ({low:.2f} to {high:.2f})"


def without_bitsandbytes(folder: Path) -> None:
    """galore-torch's AdamW alone: its package would import what needs bitsandbytes."""
    package = ModuleType("galore_torch")
    package.__path__ = [str(folder / "galore_torch")]
    sys.modules["galore_torch"] = package


def main(peers: Path, names: Sequence[str]) -> None:
    found = {each.name.replace("-", "_"): each.version for each in distributions(path=[str(peers)])}
    missing = [f"{name}=={version}" for name, version in PEERS.items() if found.get(name.replace("-", "_")) != version]
    if missing:
        sys.exit(f"pip install --target {peers} --no-deps {' '.join(missing)}")
    sys.path.append(str(peers))
    without_bitsandbytes(peers)
    warnings.filterwarnings("ignore")  # of peers
    entries = {entry.name: entry for entry in index() if entry.slot == "optimizer" and is_measured(entry)}
    unknown = [name for name in names if name not in (*entries, "heavyball")]
    if unknown:
        sys.exit(f"no optimizer is called {', '.join(unknown)}: choose from {', '.join([*entries, 'heavyball'])}")
    size = sum(p.numel() for p in transformer().parameters())
    versions = "  ".join(f"{name} {version}" for name, version in PEERS.items())
    print(f"{size:,} parameters  {torch.get_num_threads()} threads  torch {torch.__version__}  {versions}")
    for line in compare([Contestant("AdamW", adamw(), None), Contestant("AdamW, again", adamw(), None)]):
        print(line, flush=True)
    for name in names or [*entries, "heavyball"]:
        contestants = [Contestant("AdamW", adamw(), None)]
        if name == "heavyball":
            contestants.append(Contestant("heavyball's AdamW", heavyball_adamw(), None))
        else:
            contestants.append(contestant(name, own(entries[name])))
        if name in PEERS_OF:
            package, make = PEERS_OF[name]
            contestants.append(contestant(f"  {package}'s", make(contestants[1].optimizer)))
        for line in compare(contestants):
            print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
