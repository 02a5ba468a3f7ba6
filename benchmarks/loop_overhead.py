"""What the shared training loop costs over the plainest one: `load('digits').run(...)` against a hand-written loop.

Both do the same maths: 400 steps of AdamW with a cosine schedule, validated five times, tested once. They alternate in
one process; printed is the median ratio of their processor times, with the range of the middle half.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py
"""

import sys
from statistics import median, quantiles
from time import process_time

import torch
from torch import Tensor, nn

from fairtrial.tasks import load
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        correct = (model(x).argmax(1) == y).sum().item()
    model.train()
    return correct / len(y)


STEPS = 400


def plain(x: Tensor, y: Tensor, x_validation: Tensor, y_validation: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    step = 0
    while step < STEPS:
        order = torch.randperm(len(x))
        for start in range(0, len(x) - 63, 64):
            batch = order[start : start + 64]
            optimizer.zero_grad()
            value = loss(model(x[batch]), y[batch])
            value.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % (STEPS // 5) == 0:
                accuracy(model, x_validation, y_validation)
            if step == STEPS:
                break
    return accuracy(model, x_test, y_test)


def main(pairs: int = 25) -> None:
    torch.set_num_threads(1)
    task = load("digits")
    division = divide(task.samples(), task.validation, task.scale, Streams(0))
    parts = [tensor for part in division for tensor in part]
    plain(*parts), task.run({}, 0, split="test")  # the first of each imports and allocates
    ratios, ours, theirs = [], [], []
    for pair in range(pairs):
        runs = [lambda: task.run({}, 0, split="test"), lambda: plain(*parts)]
        times = {}
        for which in (0, 1) if pair % 2 else (1, 0):
            start = process_time()
            runs[which]()
            times[which] = process_time() - start
        ours.append(times[0])
        theirs.append(times[1])
        ratios.append(times[0] / times[1])
    low, _, high = quantiles(ratios, n=4)
    print(f"shared loop {median(ours):.3f} s, plain loop {median(theirs):.3f} s, {pairs} pairs")
    print(f"ratio: median {median(ratios):.3f}, middle half {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
