"""Pixel-wise contrastive loss (PCD, arXiv 2211.00218), its three implementations, its baselines.

    l_i = -log( exp(s_i.t_i / tau) / ( exp(s_i.t_i / tau) + sum_k exp(s_i.q_k / tau) ) )

With z_i = s_i.t_i / tau and L_i = log sum_k exp(s_i.q_k / tau) this is -log sigmoid(z_i - L_i):
only L_i is expensive, and its gradient is (1 / tau) times the output of an attention with query
s_i and keys = values = queue. `queue_logsumexp` is therefore one attention forward, whose output is
kept for the backward pass: no (P, K) matrix, no second pass (ours; equal to the plain form).

Two baselines (ours) tell what pixels and what contrast are worth. ``image`` is the same loss with
one pair per image, the pooled student and the pooled teacher; ``mse`` needs no negatives:

    l_i = || s_i - t_i ||^2 = 2 - 2 s_i.t_i

Shapes: P pixels (B x H x W; for ``image`` B), D embedding channels, K queued negatives. All in
float32 or wider.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcd_ray.errors import ConfigError

KINDS = ("pixel", "image", "mse")
IMPLEMENTATIONS = ("plain", "fused", "chunked")
_CHUNK_ROWS = 2048  # queue rows per block of the chunked form: P x 2048 logits at a time
_MAX_FUSED_WIDTH = 256  # attention kernels are made for head sizes up to this


def contrastive_loss(
    student: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    implementation: str,
    weights: Tensor | None = None,
) -> Tensor:
    """InfoNCE of each student pixel against its positive and K queued vectors.

    Args:
        student: (P, D) unit vectors; gradients flow through them.
        positive: (P, D) unit vectors, detached; row i is the positive of student row i.
        negatives: (K, D) unit vectors from the queue.
        temperature: tau > 0, unitless.
        implementation: one of `IMPLEMENTATIONS`; all give the same number.
        weights: (P,) share of each pixel in the loss, 0 for one without a positive; None: all
            have the same, 1 / P.

    Returns:
        Scalar sum of the pixels' shares, in nats.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if student.shape != positive.shape or student.shape[1] != negatives.shape[1]:
        raise ValueError(
            f"student {tuple(student.shape)}, positive {tuple(positive.shape)} and negatives "
            f"{tuple(negatives.shape)} do not fit; give (P, D), (P, D) and (K, D)"
        )
    logsumexp = queue_logsumexp(
        student, negatives, temperature=temperature, implementation=implementation
    )  # (P,)
    own = (student * positive).sum(dim=1) / temperature  # (P,)
    return _sum_of_shares(-F.logsigmoid(own - logsumexp), weights)


def regression_loss(student: Tensor, positive: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Squared distance of each student pixel from its positive, as feature regression has it.

    Args:
        student: (P, D) unit vectors; gradients flow through them.
        positive: (P, D) unit vectors, detached; row i is the positive of student row i.
        weights: as in `contrastive_loss`.

    Returns:
        Scalar sum of the pixels' shares: 0 where all are equal, 2 at right angles, 4 at most.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if student.shape != positive.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and positive {tuple(positive.shape)} do not fit; "
            "give (P, D) and (P, D)"
        )
    return _sum_of_shares((student - positive).square().sum(dim=1), weights)


def _sum_of_shares(per_pixel: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of (P,) losses, or their sum by (P,) weights."""
    if weights is None:
        return per_pixel.mean()
    if weights.shape != per_pixel.shape:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit {len(per_pixel)} pixels")
    return (per_pixel * weights).sum()


def queue_logsumexp(
    queries: Tensor, negatives: Tensor, *, temperature: float, implementation: str
) -> Tensor:
    """Return log sum_k exp(queries_i . negatives_k / temperature), (P,), differentiable in queries.

    The negatives are constants: no gradient is computed for them.
    """
    if implementation == "plain":
        return torch.logsumexp(queries @ negatives.detach().T / temperature, dim=1)
    attention = _fused_attention if implementation == "fused" else _chunked_attention
    result: Tensor = _AttentionLogSumExp.apply(queries, negatives, temperature, attention)
    return result


def choose_implementation(name: str, *, width: int, device: torch.device) -> str:
    """Return the implementation that ``loss.implementation`` means for this width and device.

    ``auto`` is ``fused`` where the kernel exists and passes its check against the plain form,
    else ``chunked``.

    Raises:
        ConfigError: ``fused`` was asked for by name where it cannot be had.
    """
    if name in ("plain", "chunked"):
        return name
    reason = _why_not_fused(width, device)
    if reason is None:
        return "fused"
    if name == "fused":
        raise ConfigError(f"loss.implementation='fused' {reason}; use 'auto' or 'chunked'")
    return "chunked"


class _AttentionLogSumExp(torch.autograd.Function):
    """Log-sum-exp whose gradient is the attention output that came with it."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        negatives: Tensor,
        temperature: float,
        attention: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
    ) -> Tensor:
        output, logsumexp = attention(queries, negatives, temperature)  # (P, D), (P,)
        ctx.save_for_backward(output)
        ctx.temperature = temperature
        return logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (output,) = ctx.saved_tensors
        return output * (grads[0] / ctx.temperature).unsqueeze(1), None, None, None


def _chunked_attention(
    queries: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Attention over the queue block by block with a running maximum; any width."""
    queries = queries / temperature  # once here, not in every block
    maximum = queries.new_full((len(queries), 1), -torch.inf)  # (P, 1)
    total = torch.zeros_like(maximum)  # (P, 1)
    output = torch.zeros_like(queries)  # (P, D)
    for block in negatives.split(_CHUNK_ROWS):
        logits = queries @ block.T  # (P, chunk)
        higher = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
        shrink = (maximum - higher).exp_()
        share = logits.sub_(higher).exp_()
        total.mul_(shrink).add_(share.sum(dim=1, keepdim=True))
        output.mul_(shrink).addmm_(share, block)
        maximum = higher
    return output / total, (maximum + total.log()).squeeze(1)


def _fused_attention(
    queries: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Attention by torch's fused kernels, which return the log-sum-exp only through aten.

    The operators are private to torch: they are called here alone, and `_why_not_fused` checks
    them at start-up.
    """
    q = queries.contiguous()[None, None]  # (1, 1, P, D): one head
    kv = negatives.to(queries.dtype).contiguous()[None, None]  # (1, 1, K, D)
    scale = 1.0 / temperature
    if queries.device.type == "cpu":
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, kv, kv, 0.0, False, scale=scale
        )
    else:
        output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, kv, kv, None, True, 0.0, False, scale=scale
        )
    return output[0, 0], logsumexp[0, 0, : len(queries)].to(queries.dtype)


def _why_not_fused(width: int, device: torch.device) -> str | None:
    """Return why the fused form cannot be used, or None: its result equals the plain one."""
    if width > _MAX_FUSED_WIDTH:
        return f"takes widths up to {_MAX_FUSED_WIDTH}, got {width}"
    random = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(150, width, generator=random), dim=1).to(device)
    queries, negatives = rows[:50], rows[50:]
    try:
        output, logsumexp = _fused_attention(queries, negatives, 0.2)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"has no kernel on {device.type} ({str(error).splitlines()[0]})"
    logits = queries @ negatives.T / 0.2
    # 1e-2 admits kernels that multiply in TF32; a wrong operator is off by far more.
    good = torch.allclose(logsumexp, logits.logsumexp(dim=1), atol=1e-2)
    if not good or not torch.allclose(output, logits.softmax(dim=1) @ negatives, atol=1e-2):
        return f"gives wrong numbers on {device.type} with torch {torch.__version__}"
    return None
