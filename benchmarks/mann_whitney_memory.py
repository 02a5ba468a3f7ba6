"""Mann-Whitney loss of a large batch: time, peak memory, and the largest tensor that anything on the way allocates.

    OMP_NUM_THREADS=2 python benchmarks/mann_whitney_memory.py [BATCH [DIM]]
    MALLOC_MMAP_THRESHOLD_=500000 OMP_NUM_THREADS=2 python benchmarks/mann_whitney_memory.py [BATCH [DIM]]

Forward and backward at the paper's temperature. The peak is that of the process's resident memory over what it was
before. glibc keeps some hundred MB of freed blocks; with the threshold it gives them back, so that the second call
tells what is in use, though not how fast it is, as every block is then mapped anew. The largest tensor is watched at
every operation, in a pass of its own. For comparison, the matrix of scores has BATCH² numbers and the pairs are BATCH³.
Last, a batch small enough for comparing every pair says what the grid costs in exactness.
"""

import resource
import sys
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairtrial.methods.losses.mw_loss import MannWhitneyLoss


class Largest(TorchDispatchMode):
    """Keeps the size of the largest storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def pairs(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    query, noise = torch.randn(2, batch, dim, dtype=dtype)
    return query.requires_grad_(), (query.detach() + noise).requires_grad_()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(batch: int = 8192, dim: int = 128) -> None:
    torch.manual_seed(0)
    loss = MannWhitneyLoss()
    torch.autograd.grad(loss(*(small := pairs(256, dim))), small)
    views, before = pairs(batch, dim), peak()
    wall, processor = perf_counter(), process_time()
    value = loss(*views)
    forward = perf_counter() - wall
    torch.autograd.grad(value, views)
    wall, processor = perf_counter() - wall, process_time() - processor
    print(f"batch {batch:,}, {dim} numbers each, {torch.get_num_threads()} threads, loss {value.item():.3e}")
    print(f"{wall:.1f} s, {forward:.1f} of them forward; processor time {processor:.1f} s")
    print(f"peak {peak() - before:.0f} MB over {before:.0f}; the matrix of scores would take {batch**2 / 2**18:.0f} MB")
    with Largest() as largest:
        torch.autograd.grad(loss(*views), views)
    print(f"largest tensor {largest.bytes / 2**20:.1f} MB")

    views = pairs(256, dim, torch.float64)
    ours, direct = (loss(*views) for loss in (MannWhitneyLoss(), MannWhitneyLoss(chunk_size=64)))
    slopes = [torch.cat(torch.autograd.grad(each, views)) for each in (ours, direct)]
    error = (slopes[0] - slopes[1]).abs().max() / slopes[1].abs().max()
    print(f"256 against direct pairs, float64: value {abs(ours / direct - 1).item():.1e}, gradient {error.item():.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
