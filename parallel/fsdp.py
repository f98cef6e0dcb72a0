"""Parameters sharded over data x sequence with FSDP2, experts over the expert axis first.

Collectives only ever sum: the loss carries the scale (it is normalised by the global token count), so that the
gradient is exact for any degrees, packed documents and experts that are sharded differently from the rest. This also
avoids PREMUL_SUM, which gloo lacks, and the double division of torch 2.13 on meshes of one process.

Parameters that ask for no gradient stand in their group beside others: they are gathered with them, and neither their
gradients nor messages of these exist. FSDP2 sums what has a gradient, and a layer that no gradient comes to is not
gathered again for the backward pass (but for the last of them, which is fetched ahead).

In mixed precision a layer's parameters are two groups: matrices are gathered in the half type that they compute in,
what must stay in float32 (decays, step sizes, filters, norms, routers) in float32. FSDP2 gives a module one precision;
the second group is made here as it makes them itself for parameters on different meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard

from .fsdp_traffic import CountAllReduce, CountedAllGather, CountedReduceScatter
from .ledger import CommunicationLedger
from .mesh import Mesh


def shard_model(
    model: nn.Module,
    mesh: Mesh,
    *,
    blocks: Sequence[nn.Module],
    experts: Sequence[nn.Module] = (),
    param_dtype: torch.dtype | None = None,
    float32: Set[nn.Parameter] = frozenset(),
    forward_methods: Sequence[str] = ("loss", "logits"),
    ledger: CommunicationLedger | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Shard `model`'s parameters in place (they may be on the meta device).

    Args:
        blocks: units that are gathered together while they compute, in order of use.
        experts: modules inside the blocks whose every parameter has the expert dimension first.
        param_dtype: dtype of computation (bfloat16, say); the sharded parameters and the gradient sums keep theirs
            (float32 or wider). None computes in the parameters' dtype.
        float32: parameters that compute in their own dtype whatever `param_dtype` is.
        forward_methods: methods of `model` that run like its forward.
        ledger: where the messages are counted, as "fsdp.all_gather", "fsdp.reduce_scatter" and "fsdp.all_reduce".
        labels: the blocks' names there, by default their numbers; what is outside the blocks is "model".

    Raises:
        ValueError: experts, or their second dimension, are not divisible by the processes that share them.
    """
    reduce_dtype = torch.float32 if param_dtype else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    plan = _Plan(mesh.parameter_axes, policy, float32 if param_dtype else frozenset(), ledger)
    names = dict(enumerate(labels))
    for index, block in enumerate(blocks):
        inside = [module for module in experts if any(module is part for part in block.modules())]
        for module in inside if mesh.expert_size > 1 else ():
            _spread_experts(module, mesh)
            plan.apply(module, names.get(index, str(index)), axes=mesh.expert_parameter_axes, dim=1)
        plan.apply(block, names.get(index, str(index)))
    plan.apply(model, "model")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in forward_methods:
        register_fsdp_forward_method(model, method)


@dataclass(frozen=True)
class _Plan:
    """How every unit is sharded."""

    axes: DeviceMesh
    policy: MixedPrecisionPolicy
    float32: Set[nn.Parameter]
    ledger: CommunicationLedger | None

    def apply(self, module: nn.Module, label: str, *, axes: DeviceMesh | None = None, dim: int = 0) -> None:
        """`fully_shard` in dimension `dim`, the float32 parameters in a group of their own, every group counted."""
        kept = {parameter for parameter in module.parameters() if parameter in self.float32}
        placement: Callable[[nn.Parameter], Shard | None] | None = (lambda _: Shard(dim)) if dim else None
        fully_shard(
            module,
            mesh=axes or self.axes,
            shard_placement_fn=placement,
            mp_policy=self.policy,
            ignored_params=kept or None,
        )
        assert isinstance(module, FSDPModule)
        groups = module._get_fsdp_state()._fsdp_param_groups
        if kept:
            groups.append(_group_beside(groups[0], [p for p in module.parameters() if p in kept]))
        if self.ledger is None:
            return
        for group in groups:
            group._all_gather_comm = CountedAllGather(self.ledger, label)
            group._reduce_scatter_comm = CountedReduceScatter(self.ledger, label)
            if (axes or self.axes).ndim > 1:
                group._all_reduce_hook = CountAllReduce(self.ledger, label)


def _group_beside(group: FSDPParamGroup, parameters: list[nn.Parameter]) -> FSDPParamGroup:
    """Parameters of the same modules on the same processes that compute in their own dtype."""
    for parameter in parameters:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(group.device)
    return FSDPParamGroup(
        parameters,
        group.modules,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        MixedPrecisionPolicy(),
        group.offload_policy,
    )


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
    if grads:  # an accelerator makes them all in a few launches; its wide arithmetic is slow
        kept = torch.float64 if device.type == "cpu" else torch.float32
        norms = torch._foreach_norm(grads, dtype=kept)  # pyright: ignore[reportPrivateImportUsage]
        square += torch.stack(norms).double().square().sum()
    if mesh is not None and mesh.world_size > 1:
        dist.all_reduce(square)
        square /= mesh.degrees.replicate
    norm = square.sqrt()
    if max_norm is not None and grads:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
    return norm
