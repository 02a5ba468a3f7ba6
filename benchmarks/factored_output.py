"""The factored output layer of the Z-loss against a dense one with log-softmax, both with SGD, at d = 64.

    OMP_NUM_THREADS=2 python benchmarks/factored_output.py [ROUNDS]

Time per example of the factored layer at 10,000 and at 800,000 classes, and of the dense layer at 800,000, one example
at a time and 64 at a time; the dense steps are written out (scores, softmax, update in place), without autograd. Rounds
alternate; ratios are to the factored layer at 800,000 classes. Its rebuild against drift, every 10,000 steps, is
measured apart and given per step.
"""

import sys
from collections.abc import Callable
from statistics import median, quantiles

import torch
from side_by_side import seconds
from torch import Tensor

from fairtrial.methods.losses.z_loss import FactoredSphericalOutput

DIM, FEW, MANY, LEARNING_RATE = 64, 10_000, 800_000, 0.1


def factored(weight: Tensor) -> tuple[FactoredSphericalOutput, Callable[[], None]]:
    layer = FactoredSphericalOutput(weight, 1.0, 5.0, rebuild_every=0)
    examples = iter(lambda: (torch.randn(DIM), int(torch.randint(len(weight), ()))), None)
    return layer, lambda: (layer.step(*next(examples), LEARNING_RATE), None)[1]


def dense(weight: Tensor, batch: int) -> Callable[[], None]:
    def step() -> None:
        hidden, target = torch.randn(batch, DIM), torch.randint(len(weight), (batch,))
        slope = (hidden @ weight.T).softmax(1)
        slope[torch.arange(batch), target] -= 1
        _gradient_in_hidden = slope @ weight
        weight.addmm_(slope.T, hidden, alpha=-LEARNING_RATE / batch)

    return step


def main(rounds: int = 7) -> None:
    torch.manual_seed(0)
    weights = {size: torch.randn(size, DIM) / DIM**0.5 for size in (FEW, MANY)}
    layers = {size: factored(weight) for size, weight in weights.items()}
    work = {
        f"factored, {FEW:,} classes": (layers[FEW][1], 200, 1),
        f"factored, {MANY:,} classes": (layers[MANY][1], 200, 1),
        f"dense log-softmax, {MANY:,} classes, one at a time": (dense(weights[MANY], 1), 3, 1),
        f"dense log-softmax, {MANY:,} classes, 64 at a time": (dense(weights[MANY], 64), 1, 64),
    }
    for step, _, _ in work.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (step, repeats, examples) in work.items():
            times[name].append(seconds(step, repeats) / examples)
    _, many, *_ = times.values()
    for name, found in times.items():
        ratios = [each / own for each, own in zip(found, many, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(f"{name:<56} {1e3 * median(found):8.3f} ms  {median(ratios):6.2f} x  ({low:.2f} to {high:.2f})")
    rebuild = seconds(layers[MANY][0]._rebuild, 1) / 10_000
    print(f"rebuild at {MANY:,} classes, every 10,000 steps: {1e3 * rebuild:.3f} ms per step more")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(*map(int, sys.argv[1:]))
