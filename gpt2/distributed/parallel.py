"""Strategies for training on several ranks: with DDP, each rank holds the whole model; with FSDP2, a shard of it.

The trainer calls them through one interface, which does nothing on a single device.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import Forward, GPT2Model
from gpt2.runtime.device import Precision


class SingleDevice:
    """A single process with the whole model; the base class of the other strategies."""

    is_sharded = False  # whether each rank holds only a part of each tensor

    def __init__(self, model: GPT2Model, precision: Precision, group: ProcessGroup):
        self.model, self.group = model, group

    def forward(self, compute: Forward) -> Forward:
        """Wrap a forward pass so that its backward pass averages gradients over the ranks."""
        return compute

    def pass_context(self, is_last: bool) -> AbstractContextManager[Any]:
        """The context of a forward and backward pass of a step. Ranks exchange gradients only in the last pass."""
        return nullcontext()

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which each rank has the whole model and may run it alone, without gradients."""
        return nullcontext()

    def full_norms(self, local: Tensor) -> Tensor:
        """Compute the norms (n,) of n whole tensors from the norms of this rank's parts."""
        return local

    def full_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the whole tensors on rank 0. This is a collective operation: all ranks must call it."""
        return tensors

    def local_parts(self, tensors: dict[str, Tensor], of: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's parts of whole tensors, sharded like the tensors of the same names in `of`."""
        return tensors


class DataParallel(SingleDevice):
    """DistributedDataParallel (Li et al., 2020) averages gradients during the backward pass."""

    def __init__(self, model: GPT2Model, precision: Precision, group: ProcessGroup):
        super().__init__(model, precision, group)
        self.module = _DDPModule(model)
        self.ddp = nn.parallel.DistributedDataParallel(self.module, gradient_as_bucket_view=True)

    def forward(self, compute: Forward) -> Forward:
        self.module.compute = partial(compute)  # a module as an attribute would be registered, with its weights
        return self.ddp

    def pass_context(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.ddp.no_sync()


class _DDPModule(nn.Module):
    """The module that DDP wraps. Its forward pass may be another function of the weights, such as a compiled one."""

    def __init__(self, model: GPT2Model):
        super().__init__()
        self.model = model
        self.compute: Forward = partial(model)

    def forward(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        return self.compute(**inputs)


class FullySharded(SingleDevice):
    """FSDP2: each rank holds a shard of the weights, gradients and optimizer state, in fp32.

    The weights of a block are gathered in the precision of the computation before it runs, and freed after it. The
    method is ZeRO stage 3 (Rajbhandari et al., 2020), the implementation torch.distributed.fsdp.
    """

    is_sharded = True

    def __init__(self, model: GPT2Model, precision: Precision, group: ProcessGroup):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        super().__init__(model, precision, group)
        mesh = init_device_mesh(precision.device.type, (group.size,))
        # The inputs are not cast: one of them divides the loss, and bf16 would round this number of tokens.
        policy = MixedPrecisionPolicy(precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for parameter in model.parameters():  # start from the weights of rank 0, as DDP does
            torch.distributed.broadcast(parameter.detach(), 0)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for method in ("token_losses", "score_tokens", "last_logits"):  # these are forward passes too
            register_fsdp_forward_method(model, method)

    def pass_context(self, is_last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        return nullcontext()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        modules: list[Any] = [self.model, *self.model.blocks]
        for module in modules:
            module.set_reshard_after_forward(False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not self.model, recurse=False)
                module.reshard()

    def full_norms(self, local: Tensor) -> Tensor:
        return self.group.all_reduce_(local.double().square()).sqrt().float()

    def full_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.group.is_main:
                full[name] = whole.cpu()
        return full

    def local_parts(self, tensors: dict[str, Tensor], of: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import distribute_tensor

        def part(tensor: Tensor, like: Any) -> Tensor:
            tensor = tensor.to(like.device)
            if tensor.shape != like.shape:  # a number of steps in the optimizer's state, which is not sharded
                return tensor
            return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

        return {name: part(tensor, of[name]) for name, tensor in tensors.items()}


STRATEGIES: dict[str, type[SingleDevice]] = {"ddp": DataParallel, "fsdp": FullySharded}


def build_strategy(name: str, model: GPT2Model, precision: Precision, group: ProcessGroup) -> SingleDevice:
    """Wrap a model in the named strategy; a single process always uses SingleDevice."""
    if group.size == 1:
        return SingleDevice(model, precision, group)
    return STRATEGIES[name](model, precision, group)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
