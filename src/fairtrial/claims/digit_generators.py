"""Two generators of digits with about as many weights: one of discrete tokens, one that removes noise.

Both are perceptrons with two hidden layers. How good images are is told by the Fréchet distance between features of
drawn and of held-out images, under a classifier of the same digits.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.claims.training import fit
from fairtrial.tasks.digits import samples
from fairtrial.tasks.samples import Part
from fairtrial.tasks.streams import Streams

CODES, PATCHES = 32, 16  # patches of 2×2 pixels
TOKEN_HIDDEN, NOISE_HIDDEN, EMBEDDING, TIMES = 128, 140, 8, 50


def images() -> tuple[Part, Part]:
    """Digits to train on, and those held out: 64 pixels from -1 to 1, and their classes."""
    data = samples()
    return Part(data.x / 8 - 1, data.y), Part(data.x_test / 8 - 1, data.y_test)


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )


# Tokens ------------------------------------------------------------------------------------------------------------


def to_patches(x: Float[Tensor, "n 64"]) -> Float[Tensor, "n p 4"]:
    return x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, 4)


def from_patches(patches: Float[Tensor, "n p 4"]) -> Float[Tensor, "n 64"]:
    return patches.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 64)


def codebook(x: Float[Tensor, "n 64"], generator: torch.Generator, rounds: int = 20) -> Float[Tensor, "c 4"]:
    """Means of patches by Lloyd's algorithm."""
    patches = to_patches(x).reshape(-1, 4)
    centres = patches[torch.randperm(len(patches), generator=generator)[:CODES]]
    for _ in range(rounds):
        nearest = torch.cdist(patches, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=CODES)
        sums = torch.zeros_like(centres).index_add_(0, nearest, patches)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres


class TokenModel(nn.Module):
    """Scores of the next token, from all tokens before it."""

    def __init__(self, centres: Float[Tensor, "c 4"]) -> None:
        super().__init__()
        self.register_buffer("centres", centres)
        self.tokens = nn.Embedding(CODES + 1, EMBEDDING)  # the last stands for those that are still to come
        self.places = nn.Embedding(PATCHES, 2 * EMBEDDING)
        self.net: nn.Module = perceptron((PATCHES + 2) * EMBEDDING, TOKEN_HIDDEN, CODES)

    centres: Tensor

    def encode(self, x: Float[Tensor, "n 64"]) -> Int[Tensor, "n p"]:
        return torch.cdist(to_patches(x), self.centres).argmin(-1)

    def scores(self, tokens: Int[Tensor, "n p"], place: Int[Tensor, " n"]) -> Float[Tensor, "n c"]:
        known = torch.where(torch.arange(PATCHES) < place[:, None], tokens, CODES)
        scores: Tensor = self.net(torch.cat([self.tokens(known).flatten(1), self.places(place)], 1))
        return scores

    def forward(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "np c"]:
        tokens = self.encode(x)
        place = torch.arange(PATCHES).repeat(len(x))
        return self.scores(tokens.repeat_interleave(PATCHES, 0), place)

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n 64"]:
        tokens = torch.zeros(count, PATCHES, dtype=torch.long)
        for place in range(PATCHES):
            scores = self.scores(tokens, torch.full((count,), place))
            gumbel = -(-torch.rand(scores.shape, generator=generator).clamp_min(1e-30).log()).log()
            tokens[:, place] = (scores + gumbel).argmax(1)
        return from_patches(self.centres[tokens])


def token_model(part: Part, streams: Streams, *, steps: int, lr: float) -> TokenModel:
    """Trained to predict the tokens of images."""
    with streams.globally("model"):
        model = TokenModel(codebook(part.x, streams("codebook")))
    tokens = model.encode(part.x)

    def loss(scores: Tensor, target: Tensor, *, index: Int[Tensor, " b"]) -> Tensor:
        return F.cross_entropy(scores, tokens[index].flatten())

    fit(model, torch.optim.AdamW(model.parameters(), lr), part, streams, steps=steps, loss=loss)
    return model


# Noise -------------------------------------------------------------------------------------------------------------


class NoiseModel(nn.Module):
    """The noise in an image, of which time t of 50 keeps the share cos²(π t / 100) of the variance as image."""

    def __init__(self, noise: torch.Generator) -> None:
        super().__init__()
        self.noise = noise
        self.net: nn.Module = perceptron(64 + 2 * EMBEDDING, NOISE_HIDDEN, 64)
        kept = torch.cos(torch.arange(TIMES + 1) / (TIMES + 1) * math.pi / 2).square()
        self.register_buffer("kept", kept)

    kept: Tensor

    def predict(self, x: Float[Tensor, "n 64"], time: Int[Tensor, " n"]) -> Float[Tensor, "n 64"]:
        angles = time[:, None] / TIMES * math.pi * 2.0 ** torch.arange(EMBEDDING)
        noise: Tensor = self.net(torch.cat([x, angles.sin(), angles.cos()], 1))
        return noise

    def forward(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n 2 64"]:
        """The noise that is predicted, and that which was added, at random times."""
        time = torch.randint(1, TIMES + 1, (len(x),), generator=self.noise)
        noise = torch.randn(x.shape, generator=self.noise)
        kept = self.kept[time][:, None]
        return torch.stack([self.predict(kept.sqrt() * x + (1 - kept).sqrt() * noise, time), noise], 1)

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n 64"]:
        x = torch.randn(count, 64, generator=generator)
        for time in range(TIMES, 0, -1):
            now, then = self.kept[time], self.kept[time - 1]
            noise = self.predict(x, torch.full((count,), time))
            image = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
            step = 1 - now / then
            mean = (then.sqrt() * step * image + (now / then).sqrt() * (1 - then) * x) / (1 - now)
            fresh = torch.randn(x.shape, generator=generator)
            x = mean + (step * (1 - then) / (1 - now)).sqrt() * fresh
        return x


def noise_model(part: Part, streams: Streams, *, steps: int, lr: float) -> NoiseModel:
    """Trained to tell the noise in images."""
    with streams.globally("model"):
        model = NoiseModel(streams("noise"))

    def loss(both: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(both[:, 0], both[:, 1])

    fit(model, torch.optim.AdamW(model.parameters(), lr), part, streams, steps=steps, loss=loss)
    return model


# Distance ----------------------------------------------------------------------------------------------------------


def features(part: Part, streams: Streams, *, steps: int) -> nn.Module:
    """The last hidden layer of a classifier of the images."""
    with streams.globally("model"):
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
    fit(model, torch.optim.AdamW(model.parameters(), 3e-3), part, streams, steps=steps)
    return model[:4].eval()


def frechet_distance(x: Float[Tensor, "n f"], y: Float[Tensor, "m f"]) -> float:
    """‖μ_x - μ_y‖² + tr(Σ_x + Σ_y - 2 (Σ_x Σ_y)^½)."""
    a, b = (values.double().numpy() for values in (x, y))
    left, right = np.cov(a.T), np.cov(b.T)
    root = _root(left)
    between = np.linalg.eigvalsh(root @ right @ root).clip(0)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(left + right) - 2 * np.sqrt(between).sum())


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root
