"""Muon (Jordan et al., 2024) for the weights that are matrices, AdamW for all others."""

from collections import defaultdict
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

# Coefficients of the Newton-Schulz iteration, which brings singular values close to 1 in 5 steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5
# The root mean square of an AdamW update, which those of matrices get too (Liu et al., 2025).
_UPDATE_SIZE = 0.2
# A matrix with fewer rows or columns, such as a class head's, is left to AdamW.
_LEAST_SIDE = 16


class Muon(torch.optim.AdamW):
    """AdamW in which the update of a matrix is its momentum with equal singular values.

    Convolutions are matrices of output channels and all else. The stacked projections of an
    attention, three times as many rows as columns, are three matrices.

    Args:
        params, lr, weight_decay, kwargs: as in AdamW, the same for both kinds of update.
        momentum: Nesterov's momentum of the matrices' gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        momentum: float = 0.95,
        **kwargs: Any,
    ):
        super().__init__(params, lr=lr, weight_decay=weight_decay, **kwargs)
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        matrices = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and _is_matrix(parameter)
        ]
        gradients = [parameter.grad for parameter, _ in matrices]
        self._update_matrices(matrices)
        for parameter, _ in matrices:
            parameter.grad = None
        super().step()
        for (parameter, _), gradient in zip(matrices, gradients):
            parameter.grad = gradient

    def _update_matrices(self, matrices: List[Tuple[Tensor, Dict[str, Any]]]) -> None:
        """Matrices of one shape are updated together, with few operations on a GPU."""
        by_shape = defaultdict(list)
        for parameter, group in matrices:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
                state["step"] = torch.zeros(())  # AdamW expects it in every state that it loads
            momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
            update = _as_matrices(gradient.lerp(momentum, self.momentum))
            by_shape[update.shape].append((parameter, group["lr"], group["weight_decay"], update))
        for shape, members in by_shape.items():
            updates = orthogonalize(torch.stack([update for *_, update in members]))
            size = _UPDATE_SIZE * max(shape[-2:]) ** 0.5
            for (parameter, lr, weight_decay, _), update in zip(members, updates):
                parameter.mul_(1 - lr * weight_decay)
                parameter.add_(update.reshape(parameter.shape), alpha=-lr * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(..., m, n) matrices with the same singular vectors, and singular values of about 1.

    The iteration multiplies X by polynomials of X X^T. These are collected, since products of the
    smaller of the two sides take less time than those of X itself.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], device=gram.device)
    factor = step = a * identity + b * gram + c * (gram @ gram)
    for _ in range(_NUM_STEPS - 1):
        gram = step @ gram @ step
        step = a * identity + b * gram + c * (gram @ gram)
        factor = step @ factor
    x = factor @ x
    return (x if wide else x.mT).to(matrices.dtype)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and min(len(parameter), parameter[0].numel()) >= _LEAST_SIDE


def _as_matrices(update: Tensor) -> Tensor:
    """(rows, ...) as (1 or 3, rows, columns)."""
    rows, columns = len(update), update[0].numel()
    count = 3 if update.dim() == 2 and rows == 3 * columns else 1
    return update.reshape(count, rows // count, columns)
