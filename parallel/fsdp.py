"""Parameters sharded over data x sequence with FSDP2, experts over the expert axis first.

Collectives only ever sum: the loss carries the scale (it is normalised by the global token count), so that the
gradient is exact for any degrees, packed documents and experts that are sharded differently from the rest. This also
avoids PREMUL_SUM, which gloo lacks, and the double division of torch 2.13 on meshes of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from .mesh import Mesh


def shard_model(
    model: nn.Module,
    mesh: Mesh,
    *,
    blocks: Sequence[nn.Module],
    experts: Sequence[nn.Module] = (),
    param_dtype: torch.dtype | None = None,
    forward_methods: Sequence[str] = ("loss", "logits"),
) -> None:
    """Shard `model`'s parameters in place (they may be on the meta device).

    Args:
        blocks: units that are gathered together while they compute, in order of use.
        experts: modules inside the blocks whose every parameter has the expert dimension first.
        param_dtype: dtype of computation (bfloat16, say); the sharded parameters and the gradient sums keep theirs
            (float32 or wider). None computes in the parameters' dtype.
        forward_methods: methods of `model` that run like its forward.

    Raises:
        ValueError: experts, or their second dimension, are not divisible by the processes that share them.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None)
    if mesh.expert_size > 1:
        for module in experts:
            _spread_experts(module, mesh)
            fully_shard(
                module, mesh=mesh.expert_parameter_axes, shard_placement_fn=lambda _: Shard(1), mp_policy=policy
            )
    for block in blocks:
        fully_shard(block, mesh=mesh.parameter_axes, mp_policy=policy)
    fully_shard(model, mesh=mesh.parameter_axes, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in forward_methods:
        register_fsdp_forward_method(model, method)


def _spread_experts(module: nn.Module, mesh: Mesh) -> None:
    """Replace each (E, ...) parameter by this process's experts, as a tensor distributed over the expert axis."""
    shares = mesh.world_size // (mesh.expert_size * mesh.degrees.replicate)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] % mesh.expert_size:
            raise ValueError(f"{parameter.shape[0]} experts cannot be spread over {mesh.expert_size} processes")
        if parameter.shape[1] % shares:
            raise ValueError(f"experts of width {parameter.shape[1]} cannot be sharded over {shares} processes")
        local = parameter.detach().chunk(mesh.expert_size)[mesh.expert_axis.get_local_rank()]
        spread = DTensor.from_local(local.contiguous(), mesh.expert_axis, [Shard(0)], run_check=False)
        module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None, mesh: Mesh | None = None) -> Tensor:
    """Scale gradients so that their global norm is at most `max_norm`; returns the norm before, float64.

    Every parameter is sharded over data x sequence in one way or another and copied over replicate, so one sum over
    all processes is the true global norm, experts included.
    """
    grads = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    device = grads[0].device if grads else torch.device("cpu")
    square = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        square += torch.linalg.vector_norm(grad, dtype=torch.float64 if device.type == "cpu" else torch.float32) ** 2
    if mesh is not None and mesh.world_size > 1:
        dist.all_reduce(square)
        square /= mesh.degrees.replicate
    norm = square.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale.to(grad.dtype))
    return norm
