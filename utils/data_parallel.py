"""Training one network in all processes of a run: each on its rows of every batch, so that a step is that of one.

The loss of a batch is the sum of its parts', each weighed by its share of what the mean is over. Gradients are summed
by DistributedDataParallel, or by FSDP, which also divides the weights and what the optimizer keeps. Divided tensors
take half a second to import and are known to runs in several processes alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import own_rows, rank, summed, world_size
from utils.seed import random_state_restored

Batch = dict[str, Tensor]
# the loss of some rows, weighed by their share of a whole batch (the second argument)
PartLoss = Callable[[Batch, Batch], Tensor]


class _Losing(nn.Module):
    """A loss as a module, since what DistributedDataParallel wraps has to be called."""

    def __init__(self, network: nn.Module, loss_of: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_of(batch)


def part_of(batch: Batch) -> Batch:
    """This process's rows of a batch; where it has none, no rows at all."""
    rows = own_rows(len(next(iter(batch.values()))))
    return {name: tensor[rows] for name, tensor in batch.items()}


def divided_loss(network: nn.Module, loss_of: PartLoss, sharded: bool) -> Callable[[Batch], Tensor]:
    """A loss of whole batches whose gradients, in all processes, are those of a single one.

    Args:
        network: What is trained.
        loss_of: The loss of some rows, weighed by their share of the whole batch; 0 but with a gradient for no rows.
        sharded: Whether FSDP looks after the network; else DistributedDataParallel does.

    Returns:
        A function of a whole batch; the mean of what it gives in all processes is the loss.
    """

    def own(batch: Batch) -> Tensor:
        # gradients are averaged over the processes, the parts have to be added
        return world_size() * loss_of(part_of(batch), batch)

    if sharded:
        return own
    return _Averaged(network, own)


class _Averaged:
    """A loss whose gradients DistributedDataParallel averages; set up with a first batch, which shows what is used."""

    def __init__(self, network: nn.Module, loss_of: Callable[[Batch], Tensor]) -> None:
        self.losing = _Losing(network, loss_of)
        self.wrapped: nn.Module | None = None

    def __call__(self, batch: Batch) -> Tensor:
        if self.wrapped is None:
            self.wrapped = self._set_up(batch)
        return self.wrapped(batch)

    def _set_up(self, batch: Batch) -> nn.Module:
        """Wrap the loss, and let gradients be packed as they will be from the second pass on.

        Packing decides the order of sums: without a first pass that does not count, a training that goes on would
        end with other last bits than one that ran through.
        """
        moving = [parameter for parameter in self.losing.parameters() if parameter.requires_grad]
        with random_state_restored():
            gradients = torch.autograd.grad(self.losing(batch), moving, allow_unused=True)
            missing = torch.tensor(sum(gradient is None for gradient in gradients))
            # as behind an emptied layer
            unused = bool(summed({"missing": missing})["missing"])
            wrapped = DistributedDataParallel(self.losing, find_unused_parameters=unused)
            wrapped(batch).backward()
        for parameter in moving:
            parameter.grad = None
        return wrapped


def mean_of(losses: Tensor) -> Tensor:
    """Losses averaged over the processes, in the order of their ranks."""
    return summed({"losses": losses})["losses"] / world_size()


def why_whole(network: nn.Module) -> str | None:
    """Why a network must see whole batches, or None."""
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        return "batch norm takes its statistics from whole batches"
    return None


@contextmanager
def own_stream(step: int) -> Iterator[None]:
    """Random numbers of this process's own for one step; those that make the batches stay the same in all."""
    with random_state_restored():
        torch.manual_seed(torch.initial_seed() + 7919 * (step + 1) + rank())
        yield


def shard(network: nn.Module, blocks: Sequence[str], device: torch.device) -> None:
    """Divide a network's parameters between the processes, in place, block by block (FSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for name in blocks:
        fully_shard(network.get_submodule(name), mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is divided between processes, in one piece; to be asked for by all of them."""
    if world_size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor of the same shape divided as another one is."""
    if world_size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def load_whole(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a network, whether it is divided or not."""
    held = network.state_dict()
    # in the network's order, the same in all processes
    network.load_state_dict({name: divided_like(weights[name], tensor) for name, tensor in held.items()})
