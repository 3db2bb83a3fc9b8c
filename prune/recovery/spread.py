"""How a recovery's training is spread over the processes of a run."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from data.base import DataBundle, Weighing
from models.base import PrunableModel
from prune.recovery.zeros import Kept
from utils.data_parallel import divided_like, shard, why_whole
from utils.distributed import world_size
from utils.errors import InputError

if TYPE_CHECKING:
    from prune.recovery.base import TrainedRecovery, Trainee


@dataclass(frozen=True)
class Spread:
    """What each process does of a training.

    Attributes:
        world: How many processes there are.
        reason: Why each of them trains on whole batches, as a single one does; None where each takes its rows.
        sharded: Whether weights, gradients and the optimizer's state are divided, too.
    """

    world: int = 1
    reason: str | None = None
    sharded: bool = False

    @property
    def divided(self) -> bool:
        """Whether each process takes its rows of every batch."""
        return self.world > 1 and self.reason is None

    def facts(self) -> dict[str, Any]:
        """What a record says, and what the last bits of trained weights depend on; nothing of a single process."""
        if self.world == 1:
            return {}
        each = f"whole batches: {self.reason}" if self.reason else "its rows of every batch"
        return {"processes": {"world_size": self.world, "each": each, "sharded": self.sharded}}


def spread_of(recovery: "TrainedRecovery", network: nn.Module, data: DataBundle) -> Spread:
    """Divide batches where the sum of the parts is the whole, else let every process do all.

    Raises:
        InputError: If weights are to be divided and batches can't be.
    """
    if world_size() == 1:
        return Spread()
    reason = None
    if not recovery.divides:
        reason = "the loss is no mean over samples"
    elif not isinstance(data.task, Weighing):
        reason = f"the loss of the task {data.task.name} does not say what it is a mean over"
    else:
        reason = why_whole(network)
    if recovery.sharded and reason:
        raise InputError(f"recover.sharded=true: needs batches that can be divided, and {reason}; must be false")
    return Spread(world_size(), reason, recovery.sharded)


def shard_trainee(trainee: "Trainee", model: PrunableModel) -> "Trainee":
    """Divide a model's weights between the processes, in place; and the places of its zeros with them."""
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    shard(model.network, model.blocks(), model.device)
    if not isinstance(trainee.after_step, Kept):
        return trainee
    kept = ((model.network.get_parameter(names[id(old)]), zero) for old, zero in trainee.after_step.masks)
    return replace(trainee, after_step=Kept(tuple((new, divided_like(zero, new)) for new, zero in kept)))
