"""Where the quantisers' fast paths are fast: products with packed weights, and the Walsh-Hadamard transform.

    OMP_NUM_THREADS=2 python benchmarks/fast_paths.py [ROUNDS]

A layer of 4 or 8 bits that `for_inference_` has put into the layout of PyTorch's CPU kernel is timed against the same
layer dequantising its weights, and against float32 weights; the transform against the product with its matrix, for
1,024 rows. Who is first alternates. Printed are milliseconds, medians over rounds, and the median ratio within rounds
with the range of its middle half.
"""

import sys

import torch
from side_by_side import compared, line
from torch import nn

from fairtrial.methods.quantization import (
    RoundToNearest,
    for_inference_,
    hadamard_matrix,
    hadamard_transform,
    quantize_,
)

SIZES = (576, 1536), (2048, 2048)
ROWS = 1, 4, 64


@torch.inference_mode()
def main(rounds: int) -> None:
    print(f"torch {torch.__version__}  {torch.get_num_threads()} threads")
    for wide, out in SIZES:
        plain = nn.Sequential(nn.Linear(wide, out, bias=False))
        for bits, group in ((4, 64), (8, -1)):
            packed, fast = (nn.Sequential(nn.Linear(wide, out, bias=False)) for _ in range(2))
            for model in (packed, fast):
                quantize_(model, RoundToNearest(bits, group))
            for_inference_(fast)
            for rows in ROWS:
                x = torch.randn(rows, wide)
                what = f"{bits} bits, {rows} x {wide} to {out}, kernel / "
                for words, other in (("dequantising", packed), ("float32", plain)):
                    found = compared(lambda x=x, f=fast: f(x), lambda x=x, o=other: o(x), rounds=rounds)
                    print(line(what + words, found), flush=True)
    for n in (128, 256, 512, 1024, 2048, 4096):
        x, matrix = torch.randn(1024, n), hadamard_matrix(n) / n**0.5
        found = compared(lambda x=x: hadamard_transform(x), lambda x=x, m=matrix: x @ m, rounds=rounds)
        print(line(f"transform of {n} / matrix product", found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
