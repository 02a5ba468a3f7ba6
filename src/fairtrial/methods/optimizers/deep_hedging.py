"""Deep hedging in a Heston market: a network learns to hedge a sold call option where trading costs money.

The market (Heston 1993), by the full-truncation Euler scheme with step Δ, where V⁺ = max(V, 0):

    S ← S exp((μ - V⁺/2) Δ + √(V⁺Δ) Z₁)
    V ← V + κ (θ - V⁺) Δ + ξ √(V⁺Δ) (ρ Z₁ + √(1 - ρ²) Z₂)

and profit and loss of who has sold the call for a premium and holds δ_t of the stock from t to t + 1:

    PL = premium - (S_T - K)⁺ + Σ_t δ_t (S_{t+1} - S_t) - Σ_t c S_t |δ_t - δ_{t-1}|,    δ_{-1} = 0

This is the setting of `kfac_hedging`. Objective, market parameters and the sizes of the network are documented choices
of this library; the paper's values could not be confirmed.
"""

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.kfac_hedging import KFACLSTM

DAY = 1 / 365  # years


class Paths(NamedTuple):
    """Prices and variances (n, steps + 1); a variance may fall below 0, and then counts as 0."""

    S: Float[Tensor, "n t"]
    V: Float[Tensor, "n t"]


def heston_paths(
    n: int,
    steps: int,
    dt: float = DAY,
    *,
    s0: float = 100.0,
    v0: float = 0.04,
    mu: float = 0.0,
    kappa: float = 2.0,
    theta: float = 0.04,
    xi: float = 0.3,
    rho: float = -0.7,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Paths:
    """Draw paths of the Heston market.

    Args:
        n: how many, at least 1.
        steps: of each, at least 1.
        dt: Δ, years, above 0.
        s0: price at the start, above 0.
        v0: variance at the start, a year's, at least 0.
        mu: drift of the price, a year's.
        kappa: κ, speed of the variance's return to its mean, at least 0.
        theta: θ, that mean, at least 0.
        xi: ξ, volatility of the variance, at least 0; warns where 2κθ < ξ², and the variance so reaches 0 (Feller).
        rho: ρ, correlation of price and variance, within [-1, 1].
        dtype: of the result.
        generator: what is drawn from, torch's global one by default.

    Raises:
        ValueError: an argument lies outside its range.
    """
    for name, count in (("n", n), ("steps", steps)):
        require(isinstance(count, int) and count >= 1, name, count, "a whole number of at least 1")
    for name, value in (("dt", dt), ("s0", s0)):
        require(0 < value < math.inf, name, value, "above 0 and finite")
    for name, value in (("v0", v0), ("kappa", kappa), ("theta", theta), ("xi", xi)):
        require(0 <= value < math.inf, name, value, "at least 0 and finite")
    require(abs(mu) < math.inf, "mu", mu, "finite")
    require(-1 <= rho <= 1, "rho", rho, "within [-1, 1]")
    if 2 * kappa * theta < xi**2:
        warnings.warn(
            f"2 kappa theta = {2 * kappa * theta:g} is below xi² = {xi**2:g}: the variance reaches 0", stacklevel=2
        )
    z1, z2 = torch.randn(2, steps, n, dtype=dtype, generator=generator)
    shocks = xi * (rho * z1 + math.sqrt(1 - rho**2) * z2)
    variances = [torch.full((n,), v0, dtype=dtype)]
    for shock in shocks:
        v = variances[-1].clamp(min=0.0)
        variances.append(variances[-1] + kappa * (theta - v) * dt + (v * dt).sqrt() * shock)
    V = torch.stack(variances)
    v = V[:-1].clamp(min=0.0)
    growth = ((mu - v / 2) * dt + (v * dt).sqrt() * z1).cumsum(0)
    S = s0 * torch.cat([torch.zeros_like(growth[:1]), growth]).exp()
    return Paths(S.T.contiguous(), V.T.contiguous())


class Call(NamedTuple):
    """Price of a call option, and how much it rises with the stock's."""

    price: Float[Tensor, "*n"]
    delta: Float[Tensor, "*n"]


def black_scholes_call(
    spot: Float[Tensor, "*n"], strike: float, volatility: float, time: float | Float[Tensor, "*n"]
) -> Call:
    """What Black and Scholes say of a call, without interest.

    Args:
        spot: prices of the stock, above 0.
        strike: above 0.
        volatility: a year's, above 0.
        time: years left, above 0.
    """
    require(0 < strike < math.inf, "strike", strike, "above 0 and finite")
    require(0 < volatility < math.inf, "volatility", volatility, "above 0 and finite")
    spread = volatility * torch.as_tensor(time, dtype=spot.dtype, device=spot.device).sqrt()
    d1 = (spot / strike).log() / spread + spread / 2
    delta = torch.special.ndtr(d1)
    return Call(spot * delta - strike * torch.special.ndtr(d1 - spread), delta)


class ProfitAndLoss(NamedTuple):
    """Of each path: profit, the cost of trading being taken off already, and that cost."""

    pnl: Float[Tensor, " n"]
    cost: Float[Tensor, " n"]


def hedging_pnl(
    S: Float[Tensor, "n t"],
    delta: Float[Tensor, "n s"],
    strike: float,
    cost: float = 1e-3,
    premium: float = 0.0,
    *,
    close: bool = False,
) -> ProfitAndLoss:
    """Profit and loss of who sells a call and hedges it.

    Args:
        S: prices (n, steps + 1).
        delta: stock held from each time to the next (n, steps).
        strike: of the call, above 0.
        cost: part of the traded value that a trade costs, at least 0.
        premium: what the call was sold for.
        close: whether selling the stock in the end costs, too.
    """
    shape = (S.shape[0], S.shape[1] - 1)
    require(tuple(delta.shape) == shape, "delta", tuple(delta.shape), f"of shape {shape}, a step shorter than S")
    require(0 < strike < math.inf, "strike", strike, "above 0 and finite")
    require(0 <= cost < math.inf, "cost", cost, "at least 0 and finite")
    require(abs(premium) < math.inf, "premium", premium, "finite")
    traded = torch.cat([delta[:, :1], delta.diff(dim=1)], 1).abs()
    paid = cost * (S[:, :-1] * traded).sum(1)
    if close:
        paid = paid + cost * S[:, -1] * delta[:, -1].abs()
    payoff = (S[:, -1] - strike).clamp(min=0.0)
    return ProfitAndLoss(premium - payoff + (delta * S.diff(dim=1)).sum(1) - paid, paid)


def mean_variance(pnl: Float[Tensor, " n"], cost: Float[Tensor, " n"], cost_weight: float = 0.0) -> Float[Tensor, ""]:
    """Var(PL) + cost_weight · E[cost]."""
    require(0 <= cost_weight < math.inf, "cost_weight", cost_weight, "at least 0 and finite")
    return pnl.var(correction=0) + cost_weight * cost.mean()


def quadratic(pnl: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """E[PL²]."""
    return pnl.square().mean()


def entropic(pnl: Float[Tensor, " n"], risk_aversion: float = 1.0) -> Float[Tensor, ""]:
    """The entropic risk 1/λ log E exp(-λ PL)."""
    require(0 < risk_aversion < math.inf, "risk_aversion", risk_aversion, "above 0 and finite")
    return (torch.logsumexp(-risk_aversion * pnl, 0) - math.log(len(pnl))) / risk_aversion


def cvar(pnl: Float[Tensor, " n"], threshold: Float[Tensor, ""], level: float = 0.95) -> Float[Tensor, ""]:
    """Conditional value at risk, as Rockafellar and Uryasev (2000) write it: its minimum over the threshold.

    Args:
        pnl: profits.
        threshold: trained along; at the minimum a loss is larger in a part 1 - level of the cases.
        level: within [0, 1): of the losses the worst part of 1 - level is averaged.
    """
    require(0 <= level < 1, "level", level, "within [0, 1)")
    return threshold + (-pnl - threshold).clamp(min=0.0).mean() / (1 - level)


class DeepHedger(nn.Module):
    """The policy: an LSTM sees price, variance and time left; a linear map and tanh give the stock to hold.

    Prices go in as log(S/K) in units of √(variance · maturity), variances as V/variance - 1, and the time left as a
    part of the maturity.

    Args:
        hidden_size: of the LSTM.
        num_layers: of the LSTM.
        strike: of the option.
        maturity: years.
        variance: an ordinary one, a year's, for scale.
    """

    def __init__(
        self,
        hidden_size: int = 16,
        num_layers: int = 1,
        *,
        strike: float = 100.0,
        maturity: float = 30 * DAY,
        variance: float = 0.04,
    ) -> None:
        super().__init__()
        for name, value in (("strike", strike), ("maturity", maturity), ("variance", variance)):
            require(0 < value < math.inf, name, value, "above 0 and finite")
        self.strike, self.maturity, self.variance = strike, maturity, variance
        self.lstm = KFACLSTM(3, hidden_size, num_layers)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, S: Float[Tensor, "n t"], V: Float[Tensor, "n t"]) -> Float[Tensor, "n s"]:
        """The stock to hold from each time to the next, within (-1, 1), of prices and variances (n, steps + 1)."""
        price = (S[:, :-1] / self.strike).log() / math.sqrt(self.variance * self.maturity)
        left = torch.linspace(1, 0, S.shape[1], dtype=S.dtype, device=S.device)[:-1].expand_as(price)
        outputs, _ = self.lstm(torch.stack([price, V[:, :-1] / self.variance - 1, left], 2))
        delta: Tensor = self.head(outputs).squeeze(2).tanh()
        return delta
