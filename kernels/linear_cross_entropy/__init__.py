"""Language-model loss without the logits of all tokens in memory. Legend: N tokens, D width, V vocabulary."""

from torch import Tensor

from .. import triton_support
from .portable import LinearCrossEntropy

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
    ignore_index: int = -100,
) -> Tensor:
    """Sum over tokens of the cross-entropy (nats) of softmax(hidden weight^T + bias) against `targets_N`.

    Args:
        hidden_ND: final hidden states. weight_VD: output embedding, of the same dtype. bias: (V,).
        targets_N: int64; tokens whose target is `ignore_index` count nothing.
        chunk_size: tokens whose logits are held at a time; the memory is chunk_size x V.

    Returns a scalar, float32 (float64 for float64 inputs). Gradients are computed in the forward, so divide the result,
    or scale its gradient, instead of calling this again.

    Raises:
        ValueError: if shapes or dtypes do not agree or, on the CPU, if a target is outside the vocabulary. Elsewhere
            such a target is not looked for; in the Triton kernel it makes the loss NaN.
    """
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2:
        raise ValueError(
            f"linear cross-entropy: hidden states are {tuple(hidden_ND.shape)} and weight is {tuple(weight_VD.shape)}; "
            "give (tokens, width), as by x.flatten(0, 1), and (vocabulary, width)"
        )
    tokens, width = hidden_ND.shape
    vocabulary = weight_VD.shape[0]
    if weight_VD.shape[1] != width or weight_VD.dtype != hidden_ND.dtype:
        raise ValueError(
            f"linear cross-entropy: weight is {tuple(weight_VD.shape)} {weight_VD.dtype}, "
            f"hidden states are {tuple(hidden_ND.shape)} {hidden_ND.dtype}; widths and dtypes must agree"
        )
    if tuple(targets_N.shape) != (tokens,):
        raise ValueError(f"linear cross-entropy: targets have shape {tuple(targets_N.shape)}, expected ({tokens},)")
    if chunk_size < 1:
        raise ValueError(f"linear cross-entropy: chunk_size is {chunk_size}; it must be at least 1")
    if targets_N.device.type == "cpu" and tokens:  # on an accelerator the check would wait for it
        outside = (targets_N != ignore_index) & ((targets_N < 0) | (targets_N >= vocabulary))
        if outside.any():
            value = int(targets_N[outside][0])
            raise ValueError(f"linear cross-entropy: target {value} is outside the vocabulary of {vocabulary}")
    function = LinearCrossEntropy
    if triton_support.takes(hidden_ND, weight_VD, bias):
        from .triton_entropy import TritonLinearCrossEntropy as function
    return function.apply(hidden_ND, weight_VD, targets_N, bias, chunk_size, ignore_index)
