"""Newton's method with any Hessian ⪰ 0, regularised by the gradient's norm (Semenov, Jaggi, Doikov; arXiv:2506.13710).

With a positive definite B, ‖x‖² = xᵀBx, ‖g‖_*² = gᵀB⁻¹g, and H(x) the Hessian or what stands for it,

    x⁺ = x - (H(x) + λ B)⁻¹ ∇f(x),    λ = ‖∇f(x)‖_* / γ

so that no step is longer than γ where H ⪰ 0. Algorithm 1 takes the step if f(x) - f(x⁺) ≥ ‖∇f(x⁺)‖_*² / (8 λ), and
doubles γ for the next one; else it halves γ and tries again. The γ it looks for, the *gradient-normalised smoothness*,
is the largest for which ∇f(x + h) differs from ∇f(x) + H(x) h by at most ‖∇f(x)‖_* ‖h‖ / γ over ‖h‖ ≤ γ: it holds the
error of the Taylor expansion as well as that of H. H = 0 is the normalised gradient method, with the same search.

Approximations of the Hessian are here for the paper's problems: log-sum-exp (`softmax_ggn`), powers of the norm of
residuals (`gauss_newton`, `fisher_term`) and logistic regression (`fisher_logistic`).

The authors' code takes λ = ‖∇f(x)‖_* / (γ + 1e-8), and so does this. It ends the search where the factorisation fails
and moves by the last direction; here γ is halved, as Hessians of non-convex functions ask for. And after 40 trials that
all failed it moves to the last point; here the method then ends without success at the best point there is.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import OptimizeResult
from scipy.special import expit, softmax
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.torch_contract import check_state

EPS, GAMMA_MIN, MAX_SEARCH = 1e-8, 1e-9, 40  # the authors'
Matrix = Callable[[ndarray], Any]  # H(x), (d, d), for x (d,)
LARGEST = 5000  # parameters of which `GNSNewton` writes out the Hessian


def grad_norm_smooth_newton(
    fun: Callable[..., float],
    x0: Float[ndarray, " d"],
    args: tuple[Any, ...] = (),
    *,
    jac: Callable[..., ndarray],
    hess: Callable[..., ndarray],
    B: Float[ndarray, "d d"] | None = None,
    gamma0: float = 1.0,
    adaptive: bool = True,
    max_iter: int = 1000,
    gtol: float = 1e-8,
    f_star: float | None = None,
    ftol: float = 1e-8,
    max_search: int = MAX_SEARCH,
    callback: Callable[[OptimizeResult], Any] | None = None,
    **unknown_options: Any,
) -> OptimizeResult:
    """Minimise a function of several variables, as `scipy.optimize.minimize(…, method=grad_norm_smooth_newton)` too.

    Args:
        fun: f, of x (d,) and `args`.
        x0: where to start (d,).
        args: further arguments of `fun`, `jac` and `hess`.
        jac: ∇f, (d,).
        hess: H, symmetric (d, d): the Hessian, or a positive semi-definite approximation of it.
        B: the metric, positive definite; the identity by default.
        gamma0: γ at the start, above 0.
        adaptive: look for γ; without it every step is taken at gamma0.
        max_iter: most steps.
        gtol: end where ‖∇f(x)‖_* is below it, or 0.
        f_star: the least value of f, if it is known,
        ftol: to end where f(x) - f_star is below this too.
        max_search: most trials for a step.
        callback: called after every step with a result of x, fun, jac and gamma; ends the run by StopIteration.
        unknown_options: what else `minimize` hands to a method (bounds, constraints, hessp), refused unless empty.

    Returns:
        x, fun, jac, nit, nfev, njev, nhev, n_factorizations, gamma_history (γ before each step and at the end),
        fun_history, success, status (0 converged, 1 too many steps, 2 no step, 3 not finite, 4 stopped) and message.

    The defaults are the authors'.

    Raises:
        ValueError: an argument lies outside its range, or a gradient or Hessian is of another shape or not symmetric.
    """
    given = sorted(name for name, value in unknown_options.items() if value is not None and np.size(value))
    require(not given, "options", given, "none but those of grad_norm_smooth_newton")
    x = np.array(x0, dtype=np.float64)
    require(x.ndim == 1 and x.size > 0, "x0", x.shape, "of shape (d,), with d at least 1")
    require(bool(np.isfinite(x).all()), "x0", x0, "finite")
    require(callable(jac), "jac", jac, "a function")
    require(callable(hess), "hess", hess, "a function")
    require(0 < gamma0 < math.inf, "gamma0", gamma0, "above 0 and finite")
    require(max_iter >= 0, "max_iter", max_iter, "at least 0")
    require(gtol >= 0, "gtol", gtol, "at least 0")
    require(ftol >= 0, "ftol", ftol, "at least 0")
    require(max_search >= 1, "max_search", max_search, "at least 1")
    metric, dual = _metric(B, x.size)
    counts = {"nfev": 0, "njev": 0, "nhev": 0, "n_factorizations": 0}

    def at(point: ndarray) -> tuple[float, ndarray, float]:
        counts["nfev"] += 1
        counts["njev"] += 1
        value, g = float(fun(point, *args)), np.asarray(jac(point, *args), dtype=np.float64)
        require(g.shape == x.shape, "jac", g.shape, f"a function with values of shape {x.shape}")
        return value, g, dual(g)

    f, g, norm = at(x)
    gamma, gammas, values = gamma0, [gamma0], [f]
    nit, status, message = 0, 1, f"{max_iter} steps were not enough"
    while True:
        if not (math.isfinite(f) and math.isfinite(norm)):
            status, message = 3, "the function or its gradient is not finite at the start"
            break
        if norm < gtol or norm == 0 or (f_star is not None and f - f_star < ftol):
            status, message = 0, "converged"
            break
        if nit == max_iter:
            break
        H = np.asarray(hess(x, *args), dtype=np.float64)
        counts["nhev"] += 1
        require(H.shape == (x.size, x.size), "hess", H.shape, f"a function with values of shape {(x.size, x.size)}")
        if not np.isfinite(H).all():
            status, message = 3, "the Hessian is not finite"
            break
        symmetric = np.abs(H - H.T).max() <= 1e-6 * np.abs(H).max()
        require(bool(symmetric), "hess", "an asymmetric matrix", "symmetric")
        found = None
        for _ in range(max_search if adaptive else 1):
            lam = norm / (gamma + EPS)
            try:
                step = cho_solve(cho_factor(H + lam * metric), -g)
                counts["n_factorizations"] += 1
                trial = at(x + step)
            except LinAlgError:  # not positive definite
                gamma *= 0.5
                continue
            if not adaptive:
                found = trial
                break
            if 8 * lam * (f - trial[0]) >= trial[2] ** 2:  # false where anything is NaN
                found, gamma = trial, max(2 * gamma, GAMMA_MIN)
                break
            gamma *= 0.5
        if found is None or not (math.isfinite(found[0]) and math.isfinite(found[2])):
            status, message = (2, "no step lowers the function") if found is None else (3, "a step leads to infinity")
            break
        x, (f, g, norm), nit = x + step, found, nit + 1
        gammas.append(gamma)
        values.append(f)
        if callback is not None:
            try:
                callback(_result(x=x, fun=f, jac=g, gamma=gamma))
            except StopIteration:
                status, message = 4, "stopped by the callback"
                break
    return _result(
        x=x,
        fun=f,
        jac=g,
        nit=nit,
        gamma_history=np.array(gammas),
        fun_history=np.array(values),
        success=status == 0,
        status=status,
        message=message,
        **counts,
    )


def _result(**fields: Any) -> OptimizeResult:
    result = OptimizeResult()
    result.update(fields)
    return result


def _metric(B: ndarray | None, d: int) -> tuple[ndarray, Callable[[ndarray], float]]:
    """B, and the norm ‖g‖_* that goes with it."""
    if B is None:
        return np.eye(d), lambda g: float(np.linalg.norm(g))
    B = np.asarray(B, dtype=np.float64)
    require(B.shape == (d, d), "B", B.shape, f"of shape {(d, d)}")
    definite = bool(np.allclose(B, B.T)) and bool(np.linalg.eigvalsh(B)[0] > 0)
    require(definite, "B", B, "symmetric and positive definite")
    factor = cho_factor(B)
    return B, lambda g: math.sqrt(max(0.0, float(g @ cho_solve(factor, g))))


def softmax_ggn(A: Float[ndarray, "n d"], b: Float[ndarray, " n"], mu: float) -> Matrix:
    """Gauss-Newton matrix Aᵀ diag(π) A / μ of μ log Σ exp((a_iᵀx - b_i) / μ), with π = softmax((Ax - b) / μ).

    The Hessian less it is -(Aᵀπ)(Aᵀπ)ᵀ / μ.
    """
    require(mu > 0, "mu", mu, "above 0")
    return lambda x: A.T @ (softmax((A @ x - b) / mu)[:, None] * A) / mu


def gauss_newton(
    residual: Callable[[ndarray], ndarray], jacobian: Callable[[ndarray], ndarray], p: float = 2.0
) -> Matrix:
    """Gauss-Newton matrix of ‖u(x)‖ᵖ / p: ‖u‖ᵖ⁻² JᵀJ + (p - 2) ‖u‖ᵖ⁻⁴ (Jᵀu)(Jᵀu)ᵀ.

    The Hessian less it is ‖u‖ᵖ⁻² Σ u_i ∇²u_i.

    Args:
        residual: u, of shape (m,).
        jacobian: J, of shape (m, d).
        p: at least 2.
    """
    rank_one = fisher_term(residual, jacobian, p)

    def matrix(x: ndarray) -> Any:
        J = jacobian(x)
        return float(np.linalg.norm(residual(x))) ** (p - 2) * (J.T @ J) + rank_one(x)

    return matrix


def fisher_term(residual: Callable[[ndarray], ndarray], jacobian: Callable[[ndarray], ndarray], p: float) -> Matrix:
    """The second term of `gauss_newton` alone, of rank one; 0 at p = 2."""
    require(2 <= p < math.inf, "p", p, "at least 2 and finite")

    def matrix(x: ndarray) -> Any:
        u, J = residual(x), jacobian(x)
        length = float(np.linalg.norm(u))
        if p == 2 or length == 0:
            return np.zeros((J.shape[1], J.shape[1]))
        g = J.T @ (u / length)  # so that no power of the length is negative
        return (p - 2) * length ** (p - 2) * np.outer(g, g)

    return matrix


def fisher_logistic(X: Float[ndarray, "n d"], y: Float[ndarray, " n"]) -> Matrix:
    """Empirical Fisher matrix 1/n Σ ∇f_i ∇f_iᵀ of the mean of log(1 + exp(-y_i x_iᵀw)), for labels y of ±1."""
    require(bool((np.abs(y) == 1).all()), "y", np.unique(y), "labels of -1 and 1")
    require(y.shape == X.shape[:1], "y", y.shape, f"of shape {X.shape[:1]}")

    def matrix(w: ndarray) -> Any:
        gradients = expit(-y * (X @ w))[:, None] * X  # up to the sign
        return gradients.T @ gradients / len(X)

    return matrix


class GNSNewton(Optimizer):
    """The method for a small torch model, with the identity as metric; one step of it for each call of `step`.

    `step` needs a closure that computes the loss from the parameters and nothing else, and calls no `backward`:

        optimizer.step(lambda: F.cross_entropy(model(x), y))

    Args:
        params: one group of parameters, at most 5000 numbers in all, real and dense.
        gamma0: γ at the start, above 0.
        hessian: 'exact', or 'fisher', for which the closure returns the losses (n,) of samples, whose mean is the loss.
        max_search: most trials for a step; where all fail the parameters stay, and the next step goes on from that γ.

    The defaults are the authors'. All there is of a state is `gamma` in the parameter group.

    Raises:
        ValueError: an argument lies outside its range, there are too many parameters, or a loaded state does not fit.
        RuntimeError: loss or gradient are not finite, or parameters are complex.
    """

    needs_closure = True

    def __init__(
        self, params: ParamsT, gamma0: float = 1.0, *, hessian: str = "exact", max_search: int = MAX_SEARCH
    ) -> None:
        super().__init__(params, {"gamma": gamma0, "hessian": hessian, "max_search": max_search})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        require(not self.param_groups, "params", "several groups", "one group")
        require(0 < group["gamma"] < math.inf, "gamma0", group["gamma"], "above 0 and finite")
        require(group["hessian"] in ("exact", "fisher"), "hessian", group["hessian"], "'exact' or 'fisher'")
        require(group["max_search"] >= 1, "max_search", group["max_search"], "at least 1")
        super().add_param_group(param_group)
        count = sum(p.numel() for p in self.param_groups[0]["params"])
        require(count <= LARGEST, "params", f"{count} numbers", f"at most {LARGEST} numbers, for the Hessian to fit")

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_state(self, state, lambda group, p, saved: {})
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Move by one step of the method; returns the loss before it."""
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.requires_grad]
        if any(p.is_complex() for p in params):
            raise RuntimeError("GNSNewton does not support complex parameters")
        gamma = group["gamma"]
        loss, g, H = self._derivatives(closure, params, group["hessian"])
        norm = g.norm().item()
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise RuntimeError(f"loss and gradient must be finite, got a loss of {loss.item()}")
        before = [p.clone() for p in params]
        for _ in range(group["max_search"] if norm else 0):
            lam = norm / (gamma + EPS)
            factor, info = torch.linalg.cholesky_ex(H + lam * torch.eye(len(g), dtype=H.dtype, device=H.device))
            if not info.item():
                self._move(params, before, torch.cholesky_solve(-g[:, None], factor)[:, 0])
                reached, g_new, _ = self._derivatives(closure, params, None)
                if 8 * lam * (loss.item() - reached.item()) >= g_new.norm().item() ** 2:
                    gamma = max(2 * gamma, GAMMA_MIN)
                    break
            gamma *= 0.5
        else:
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
        group["gamma"] = gamma
        return loss

    def _move(self, params: list[Tensor], start: list[Tensor], step: Tensor) -> None:
        moves = step.split([p.numel() for p in params])
        for p, old, move in zip(params, start, moves, strict=True):
            p.copy_(old.to(move.dtype) + move.view_as(p))

    def _derivatives(
        self, closure: Callable[[], Tensor], params: list[Tensor], hessian: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient and the chosen Hessian, at least in float32."""
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        with torch.enable_grad():
            losses = closure()
            loss = losses.mean()
            exact = hessian == "exact"
            gradients = torch.autograd.grad(loss, params, create_graph=exact, retain_graph=hessian is not None)
            g = torch.cat([gradient.flatten() for gradient in gradients])
            if hessian is None:
                H = g.new_zeros(0)
            elif exact:
                H = _rows(g, params)
                H = (H + H.T) / 2
            else:
                require(losses.ndim == 1, "closure", tuple(losses.shape), "one that returns losses of shape (n,)")
                rows = _rows(losses, params)
                H = rows.T @ rows / len(rows)
        return loss.detach(), g.detach().to(dtype), H.detach().to(dtype)


def _rows(values: Float[Tensor, " n"], params: list[Tensor]) -> Float[Tensor, "n d"]:
    """The gradient of each value, as a row; 0 where a parameter does not matter."""
    if not values.requires_grad:
        return values.new_zeros(len(values), sum(p.numel() for p in params))
    eye = torch.eye(len(values), dtype=values.dtype, device=values.device)
    found = torch.autograd.grad(
        values, params, eye, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten(1) for gradient in found], 1)
