"""Post-training quantisers of the library and of packages on the small language model, at 2, 3 and 4 bits.

    pip install --target PEERS --no-deps torchao==0.18.0 llmcompressor==0.14.0.1 compressed-tensors==0.20.0 \\
        loguru datasets pyarrow pandas dill xxhash multiprocess accelerate
    OMP_NUM_THREADS=1 python benchmarks/post_training.py PEERS [SEEDS]

All get the same calibration text and groups of 64, and are judged on the same passages, which neither training nor
calibration has seen; seeds choose both. Printed are the mean bits per byte of text over seeds, the mean rise above the
model as it is, with the half-width of a 95 % interval, the bits that a weight takes with all that belongs to it, and
the seconds that quantising takes. HQQ is torchao's; GPTQ is the library's and llm-compressor's.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any, ClassVar

import torch
from scipy.stats import t as student
from torch import nn

from fairtrial.methods.quantization import PackedLinear, quantize_
from fairtrial.tasks import load
from fairtrial.tasks.post_training import NATS, bits_of, nats_per_byte
from fairtrial.tasks.trained import TrainedTask

GROUP = 64


@dataclass(frozen=True)
class HQQ:
    """torchao's half-quadratic quantisation, which needs no data."""

    bits: int

    wants: ClassVar[frozenset[str]] = frozenset()

    def quantize(self, name: str, layer: nn.Linear, found: Any) -> PackedLinear:
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as hqq

        options = {"compute_dtype": torch.float32, "device": "cpu", "raw_output": True}
        codes, scale, zero, _ = hqq(layer.weight.detach(), nbits=self.bits, group_size=GROUP, axis=1, **options)
        offset = -zero * scale
        return PackedLinear(codes.to(torch.uint8), scale.half(), offset.half(), self.bits, layer.bias)


@dataclass(frozen=True)
class CompressorGPTQ:
    """llm-compressor's GPTQ, beginning with the inputs of largest mean square, on the grid of its observers."""

    bits: int

    wants: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def quantize(self, name: str, layer: nn.Linear, found: Any) -> PackedLinear:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        scheme = {"type": "int", "symmetric": False, "strategy": "group", "actorder": "weight"}
        options = QuantizationArgs(num_bits=self.bits, group_size=GROUP, **scheme)
        weight = layer.weight.detach().float()
        groups = weight.unflatten(1, (-1, GROUP))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), options)
        scale = scale.half().float()  # in which it is held
        made, _, _ = quantize_weight(weight[None].clone(), found.hessian[None], scale[None], zero[None], None, options)
        least = -(2 ** (self.bits - 1)) - zero.float()  # the smallest level is this many scales
        codes = (made[0].unflatten(1, (-1, GROUP)) / scale[..., None] - least[..., None]).round().flatten(1)
        return PackedLinear(codes.to(torch.uint8), scale.half(), (least * scale).half(), self.bits, layer.bias)


def quantisers(task: TrainedTask) -> dict[str, Callable[[Any], Any]]:
    options = task.slots["quantizer"].options
    own = {name: options[name] for name in options.names()}
    made = {name: lambda setting, o=option: o.factory(**o.bind(setting)) for name, option in own.items()}
    return made | {
        "HQQ (torchao)": lambda setting: HQQ(setting.bits),
        "GPTQ (llm-compressor)": lambda setting: CompressorGPTQ(setting.bits),
    }


def main(peers: Path, seeds: int) -> None:
    sys.path.append(str(peers))
    print(f"torch {torch.__version__}  {torch.get_num_threads()} threads  {seeds} seeds")
    print(f"{'':<8}{'quantiser':<22}{'bits per byte':>14}{'rise':>9}{'±':>8}{'bits/weight':>13}{'seconds':>9}")
    for name in ("small-lm-ptq-2", "small-lm-ptq", "small-lm-ptq-4"):
        task = load(name)
        assert isinstance(task, TrainedTask)
        for label, make in quantisers(task).items():
            values, rises, times = [], [], []
            for seed in range(seeds):
                setting, passages = task.given(seed, "test")
                model: Any = copy.deepcopy(setting.model)
                config = make(setting)
                plain = nats_per_byte(setting.model, passages) / NATS
                start = perf_counter()
                if config is not None:
                    quantize_(model, config, setting.calibration)
                times.append(perf_counter() - start)
                values.append(nats_per_byte(model, passages) / NATS)
                rises.append(values[-1] - plain)
            half = student.ppf(0.975, seeds - 1) * stdev(rises) / math.sqrt(seeds)
            words = f"{task.bits} bits  {label:<22}{mean(values):>14.4f}{mean(rises):>9.4f}{half:>8.4f}"
            print(f"{words}{bits_of(model):>13.2f}{mean(times):>9.2f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
