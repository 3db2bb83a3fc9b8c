"""A model's forward pass through gates of ones, a gate a sample and unit, kept for many backward passes.

Where that takes too much memory, one part of a batch's samples after the other is passed: features and logits of the
others stand in it as constants, so that the gradients of the parts add up to those of the whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from data.base import DataBundle, Distributing, Probing, divergence_probe
from models.base import Batch, PrunableModel, UnitGroup
from prune.optin.losses import feature_rows, sampled
from prune.optin.precision import in_float32
from prune.optin.teacher import Settings, observe, rows_for
from utils.distributed import divided, world_size
from utils.errors import InputError
from utils.hooks import captured, hooked
from utils.memory import rows_of

Draw = Callable[[torch.Generator], Tensor]
# by unit group (count,): what the units do to one random scalar
Responses = dict[str, Tensor]

# random signs as a product of two thin matrices: as good as a full matrix, and cheaper to draw and to multiply
RANK = 64
# so few numbers a sample have their Jacobian taken whole
MOST_OUTPUTS = 32


@dataclass(frozen=True)
class Dense:
    """The dense model on a whole batch of which one part after the other is differentiated.

    Attributes:
        logits: (B, ...), float32.
        rows: Which feature rows stand for each feature point, (K,), on the device.
        features: Those rows, normalised, (K, d).
        per_sample: Rows that each feature point gives for one sample.
    """

    logits: Tensor
    rows: dict[str, Tensor]
    features: dict[str, Tensor]
    per_sample: dict[str, int]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PrunableModel, batch: Batch, settings: Settings, parts: Sequence[range]) -> "Dense":
        """Run the model on one part after the other."""
        points, logits = model.feature_points(), []
        given: dict[str, list[Tensor]] = {name: [] for name in points}
        for part in parts:
            with captured(model.network, points) as found:
                logits.append(model.logits(rows_of(batch, part)).float())
            for name in points:
                given[name].append(feature_rows(found[name], axis=model.feature_axis)[0])
        samples = parts[-1].stop
        whole = {name: torch.cat(rows) for name, rows in given.items()}  # (B * T, d)
        drawn = {name: rows_for(batch, len(rows), settings) for name, rows in whole.items()}
        rows = {n: (torch.arange(len(whole[n])) if r is None else r).to(model.device) for n, r in drawn.items()}
        features = {name: sampled(whole[name], rows[name])[0] for name in points}
        return cls(torch.cat(logits), rows, features, {name: len(found) // samples for name, found in whole.items()})

    def with_logits(self, logits: Tensor, part: range) -> Tensor:
        """All logits, those of a part of the samples with their gradients."""
        return self.logits.index_copy(0, torch.arange(part.start, part.stop, device=logits.device), logits)

    def with_features(self, name: str, features: Tensor, part: range, axis: int) -> Tensor:
        """All feature rows of a point, (K, d), those of a part of the samples with their gradients."""
        rows, first, behind = self.rows[name], *(self.per_sample[name] * at for at in (part.start, part.stop))
        at = ((rows >= first) & (rows < behind)).nonzero().flatten()
        return self.features[name].index_copy(0, at, sampled(features, rows[at] - first, axis=axis)[0])


class Graph:
    """One forward pass through gates of ones, a gate a sample and unit, kept for many backward passes.

    Args:
        model: The dense model.
        batch: On its device.
        groups: Whose units are gated.
        settings: See `Settings`.
        dense: Its answers to the whole batch, where only a part of it is differentiated.
        part: That part of the samples.
    """

    def __init__(
        self, model: PrunableModel, batch: Batch, groups: Sequence[UnitGroup], settings: Settings,
        dense: Dense | None, part: range,
    ) -> None:  # fmt: skip
        self.batch, self.groups, self.own_batch = batch, groups, rows_of(batch, part)
        self.last = len(model.blocks()) - 1
        gates = {g.name: torch.ones(len(part), g.count, device=model.device, requires_grad=True) for g in groups}
        self.gates = [gates[group.name] for group in groups]
        rows = {}
        if dense is None:
            with torch.no_grad():
                rows = observe(model, batch, settings).rows
        points, axis = model.feature_points(), model.feature_axis
        with torch.enable_grad(), gates_by_sample(model, gates):
            with captured(model.network, points) as found:
                self.own_logits = model.logits(self.own_batch)
            self.own_logits = self.own_logits.float()
            if dense is None:
                self.logits = self.own_logits
                self.features = [sampled(found[n], rows[n], axis=axis)[0] for n in points]  # (K, d) each
            else:
                self.logits = dense.with_logits(self.own_logits, part)
                self.features = [dense.with_features(n, found[n], part, axis) for n in points]
        self.own = self._own_points()

    @property
    def few_outputs(self) -> bool:
        """Whether a sample's answer is so small that its Jacobian is taken whole."""
        return self.logits[0].numel() <= MOST_OUTPUTS

    def skip_distance_probe(self, generator: torch.Generator) -> None:
        """Draw what a probe draws."""
        for features in self.features:
            for _ in range(2):
                _signs((len(features), RANK), generator)

    def distance_probe(self, generator: torch.Generator) -> tuple[dict[str, Tensor], None]:
        """Response of every unit to one random probe of the Grams, summed over samples, (count,) each."""
        with torch.enable_grad(), in_float32(self.logits.device):
            parts = [probed(features, generator) for features in self.features]
            responses = self._gradients(torch.stack(parts).sum())
        found = {}
        for group, response in zip(self.groups, responses, strict=True):
            if group.layer in self.own:  # the layer's own point moves with the unit but does not judge it
                gate = self.gates[self.groups.index(group)]
                response = response - torch.autograd.grad(parts[group.layer], gate, retain_graph=True)[0]
            found[group.name] = response.sum(dim=0).float().cpu()
        return found, None

    def divergence_probes(self, data: DataBundle, probes: int, generator: torch.Generator) -> list[Responses]:
        """Response of every unit to each of some random `<xi, y>`, summed over samples, (count,) each."""
        draw, skip = self._drawing(data)

        def probe(generator: torch.Generator) -> tuple[dict[str, Tensor], None]:
            with torch.enable_grad():
                responses = self._gradients(draw(generator))
            pairs = zip(self.groups, responses, strict=True)
            return {group.name: response.sum(dim=0).float().cpu() for group, response in pairs}, None

        return [found for found, _ in divided(drawing(skip, probes, generator), probe)]

    def deviations(self, data: DataBundle) -> list[Responses]:
        """Divergence of its samples' logits, summed, (count,) each, from how all of them move with the gates; one."""
        flat = self.own_logits.flatten(1)
        outputs = flat.shape[1]

        def column(output: int) -> tuple[dict[str, Tensor], None]:
            with torch.enable_grad():
                responses = self._gradients(flat[:, output].sum())
            return {group.name: response for group, response in zip(self.groups, responses, strict=True)}, None

        columns = [found for found, _ in divided(range(outputs), column)]
        found = {}
        for group in self.groups:
            parts = [part[group.name].to(flat.device) for part in columns]
            jacobian = torch.stack(parts, dim=-1)  # (B, count, outputs)
            moved = (flat.detach()[:, None] - jacobian).movedim(1, 0)  # (count, B, outputs)
            given, wanted = moved.reshape(group.count, *self.own_logits.shape), self.own_logits.detach()
            found[group.name] = data.task.deviation(given, wanted, self.own_batch).sum(dim=-1).float().cpu()
        return [found]

    def _drawing(self, data: DataBundle) -> tuple[Draw, Draw]:
        """What draws a random `<xi, y>` of the logits, and what draws as much without a gradient."""
        task = data.task
        if isinstance(task, Probing):
            return partial(task.probe, self.logits, self.batch), partial(task.probe, self.logits.detach(), self.batch)
        logits = self._distributions(data)
        probabilities = logits.detach().softmax(dim=-1)
        logits = torch.where(probabilities > 0, logits, 0.0)  # what can't be has no share, and no gradient

        def draw(generator: torch.Generator) -> Tensor:
            return (divergence_probe(probabilities, generator) * logits).sum()

        return draw, partial(divergence_probe, probabilities)

    def _distributions(self, data: DataBundle) -> Tensor:
        """Logits as (B, ..., outcomes), float32."""
        if not isinstance(data.task, Distributing):
            raise InputError(
                f"prune.engine=sketch: the task of data={data.name} names no distributions, and its logits of shape "
                f"{tuple(self.logits.shape)} are too many to take apart; use prune.engine=exact"
            )
        with torch.enable_grad():
            return data.task.distributions(self.logits, self.batch).float()

    def _gradients(self, scalar: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar, self.gates, retain_graph=True, materialize_grads=True)

    def _own_points(self) -> set[int]:
        """Layers before the last whose own feature point lies behind their units."""
        found = set()
        for group, gate in zip(self.groups, self.gates, strict=True):
            if group.layer < self.last and self.features[group.layer].requires_grad:
                scalar = self.features[group.layer].sum()
                if torch.autograd.grad(scalar, gate, retain_graph=True, allow_unused=True)[0] is not None:
                    found.add(group.layer)
        return found


def drawing(skip: Callable[[torch.Generator], object], count: int, generator: torch.Generator) -> list[torch.Generator]:
    """A generator for each of several probes that are drawn one after the other.

    In one process that is the same one. Where a process makes only some of the probes, each has one in the state that
    the probes before it would leave, and the given one ends behind them all.

    Args:
        skip: Draws what a probe draws.
        count: How many probes there are.
        generator: Source of their random numbers.
    """
    if world_size() == 1:
        return [generator] * count
    found = []
    for _ in range(count):
        found.append(torch.Generator().set_state(generator.get_state()))
        skip(generator)
    return found


@contextmanager
def gates_by_sample(model: PrunableModel, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply every unit by its gate where its consumer reads it; gates are (B, count)."""

    def hook_of(group: UnitGroup) -> tuple[nn.Module, object]:
        owner = torch.empty(group.count * group.width, dtype=torch.int64)
        owner[group.consumer.index.flatten()] = torch.arange(group.count).repeat_interleave(group.width)
        owner = owner.to(model.device)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            shape = [len(x), *[1] * (x.ndim - 1)]
            shape[group.consumer.channel_axis] = -1
            return (x * gates[group.name][:, owner].to(x.dtype).view(shape), *args[1:])

        return model.network.get_submodule(group.consumer.module), hook

    with hooked(before=[hook_of(group) for group in model.unit_groups() if group.name in gates]):  # type: ignore[misc]
        yield


def probed(features: Tensor, generator: torch.Generator) -> Tensor:
    """`<V, X X^T>` for a random V whose entries are uncorrelated, of mean 0 and variance 1.

    V is `U W^T / sqrt(r)` with random signs in U and W, so that it never has to be formed.

    Args:
        features: X, (K, d).
        generator: Source of the signs.
    """
    left, right = (_signs((len(features), RANK), generator).to(features) for _ in range(2))
    return ((features.T @ left) * (features.T @ right)).sum() / RANK**0.5


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).float() * 2 - 1
