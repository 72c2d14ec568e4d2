"""How the ranks share the work on a model: each holds all of it (DDP), or a part (FSDP2).

What differs between them, and from a process alone, is here; the trainer is the same for all.
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
    """The whole model on each rank, and no other rank: nothing to do. What the others do differently, they override."""

    shards = False  # whether a rank holds a part of each tensor only

    def __init__(self, model: GPT2Model, precision: Precision, group: ProcessGroup):
        self.model, self.group = model, group

    def forward(self, compute: Forward) -> Forward:
        """What computes a loss whose gradient the ranks will share, out of what computes one."""
        return compute

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around each forward and backward pass of a step: only in the last one gradients go from rank to rank."""
        return nullcontext()

    def gathered(self) -> AbstractContextManager[None]:
        """Within it, each rank may compute with the model without the others, and without gradients."""
        return nullcontext()

    def norms(self, local: Tensor) -> Tensor:
        """Norms of whole tensors (n,) from those of this rank's parts."""
        return local

    def full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from this rank's parts, on rank 0; all ranks must call it."""
        return tensors

    def parts(self, tensors: dict[str, Tensor], of: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors, cut as the tensors `of` the same name are."""
        return tensors


class DataParallel(SingleDevice):
    """DistributedDataParallel (Li et al., 2020): gradients are averaged while the backward pass goes on."""

    def __init__(self, model: GPT2Model, precision: Precision, group: ProcessGroup):
        super().__init__(model, precision, group)
        self.step = _Step(model)
        on_gpu = precision.device.type == "cuda"
        self.ddp = nn.parallel.DistributedDataParallel(
            self.step,
            device_ids=[precision.device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )

    def forward(self, compute: Forward) -> Forward:
        self.step.compute = partial(compute)  # no module, for PyTorch would count its weights twice
        return self.ddp

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.ddp.no_sync()


class _Step(nn.Module):
    """A module for DDP to wrap, so that what it computes with may be another function than the model itself."""

    def __init__(self, model: GPT2Model):
        super().__init__()
        self.model = model
        self.compute: Forward = partial(model)

    def forward(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        return self.compute(**inputs)


class FullySharded(SingleDevice):
    """FSDP2, a block at a time: of weights, gradients and optimizer state each rank holds its part, in fp32.

    Before a block computes, its weights come together in the format of the computation; after it, they are freed.
    Rajbhandari et al. (2020) is the method, torch.distributed.fsdp the implementation.
    """

    shards = True

    def __init__(self, model: GPT2Model, precision: Precision, group: ProcessGroup):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        super().__init__(model, precision, group)
        mesh = init_device_mesh(precision.device.type, (group.size,))
        # Not the inputs: among them is the divisor of the loss, which is exact in fp32 only.
        policy = MixedPrecisionPolicy(precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for parameter in model.parameters():  # as DDP does: rank 0's weights are those of all
            torch.distributed.broadcast(parameter.detach(), 0)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for method in ("token_losses", "last_logits"):  # which are forward passes too
            register_fsdp_forward_method(model, method)

    def last_pass(self, is_last: bool) -> AbstractContextManager[Any]:
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

    def norms(self, local: Tensor) -> Tensor:
        return self.group.all_reduce_(local.double().square()).sqrt().float()

    def full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.group.is_main:
                result[name] = whole.cpu()
        return result

    def parts(self, tensors: dict[str, Tensor], of: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import distribute_tensor

        result = {}
        for name, tensor in tensors.items():
            like: Any = of[name]
            is_cut = tensor.shape == like.shape  # an optimizer's count of steps is not
            on_device = tensor.to(like.device)
            result[name] = (
                distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
                if is_cut
                else on_device
            )
        return result


STRATEGIES: dict[str, type[SingleDevice]] = {"ddp": DataParallel, "fsdp": FullySharded}


def strategy(name: str, model: GPT2Model, precision: Precision, group: ProcessGroup) -> SingleDevice:
    """That of a name; in a process alone there is nothing to divide."""
    if group.size == 1:
        return SingleDevice(model, precision, group)
    return STRATEGIES[name](model, precision, group)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in its own memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
