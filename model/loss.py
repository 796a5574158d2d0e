"""Next-token cross entropy that computes logits only where a label stands, one chunk of positions at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_LOGITS = 2**24  # that exist at a time at most, whatever the vocabulary
CHUNK_TOKENS = 256  # more at a time are hardly faster


def supervised_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum of the float32 cross entropy over supervised positions, divided by `num_items`.

    The label at position t is predicted from the hidden state at t - 1; labels of -100 are not supervised. Logits exist
    for `chunk_tokens` positions at a time, never as `[B, T, V]`: the gradient of a chunk is computed beside its loss
    and its logits are dropped, so the backward pass needs none.

    Args:
        hidden: `[B, T, H]`, output of the last norm.
        head: module that maps `[n, H]` to logits `[n, V]`; any module does (quantized, wrapped by an adapter) that
            tells V as `out_features`, or without it, if `chunk_tokens` is given.
        labels: `[B, T]` in the coordinates of `hidden`, not shifted.
        num_items: divisor, usually the number of supervised tokens of the global batch; the own count by default.
        chunk_tokens: supervised positions per chunk; about `3 * 4 * chunk_tokens * V` bytes are held at a time. By
            default `CHUNK_TOKENS`, or as many as make `CHUNK_LOGITS` logits, so that memory does not grow with a
            large vocabulary.

    Returns:
        Scalar float32 loss; 0 with zero gradients where nothing is supervised.

    Raises:
        ValueError: `labels` is not `[B, T]`, or `chunk_tokens` is not positive.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels have shape {list(labels.shape)}, expected {list(hidden.shape[:2])} ([B, T])")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected a positive number")
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    rows, targets = hidden[:, :-1][supervised], targets[supervised]  # [S, H], [S]
    if num_items is None:
        num_items = max(len(targets), 1)
    return summed_cross_entropy(rows, targets, head, chunk_tokens) / num_items


def summed_cross_entropy(rows: Tensor, targets: Tensor, head: nn.Module, chunk_tokens: int | None = None) -> Tensor:
    """Summed float32 cross entropy of `head(rows)`, rows `[S, H]`, and the ids `targets` `[S]`, a chunk at a time."""
    chunk_tokens = chunk_tokens or min(max(CHUNK_LOGITS // head.out_features, 1), CHUNK_TOKENS)
    parameters = [p for p in head.parameters() if p.requires_grad]
    zero3 = any(hasattr(parameter, "ds_id") for parameter in parameters)
    if torch.is_grad_enabled() and (rows.requires_grad or parameters) and not zero3:
        return _ChunkedCrossEntropy.apply(rows, targets, head, chunk_tokens, *parameters)
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    for row, target in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        # The hooks of DeepSpeed's ZeRO-3 bear no gradient of a weight beside the backward pass, so logits of a head
        # that it trains are made anew there.
        computed = (head, row, target)
        total = total + (
            checkpoint(_cross_entropy, *computed, use_reentrant=False) if zero3 else _cross_entropy(*computed)
        )
    return total


def _cross_entropy(head: nn.Module, row: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(head(row).float(), target, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `head(rows)`; computes the gradients of rows and head parameters in its forward pass."""

    @staticmethod
    def forward(ctx, rows: Tensor, targets: Tensor, head: nn.Module, chunk_tokens: int, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        grad_rows = torch.zeros_like(rows)
        grad_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for start in range(0, len(rows), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            row = rows[chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(row)  # [c, V]
            loss, grad_logits = _cross_entropy_with_grad(logits, targets[chunk])
            grad_row, *grads = torch.autograd.grad(logits, (row, *parameters), grad_logits)
            total += loss
            grad_rows[chunk] = grad_row
            for accumulated, grad in zip(grad_parameters, grads, strict=True):
                accumulated += grad
        ctx.save_for_backward(grad_rows, *(g.to(p.dtype) for g, p in zip(grad_parameters, parameters, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        grad_rows, *grad_parameters = ctx.saved_tensors
        scaled = [(grad * grad_output).to(grad.dtype) for grad in (grad_rows, *grad_parameters)]
        return scaled[0], None, None, None, *scaled[1:]


@torch.no_grad()
def _cross_entropy_with_grad(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of logits `[c, V]` in float32 and its gradient `softmax - one_hot`, `[c, V]`."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    index = targets.unsqueeze(-1)
    loss = -log_probs.gather(-1, index).sum()
    grad = log_probs.exp_()
    grad.scatter_add_(-1, index, torch.full_like(index, -1, dtype=grad.dtype))
    return loss, grad.to(logits.dtype)
