"""OPTIN's losses of all units at once, estimated from a few backward passes.

MD is a squared distance of Grams with neither value nor gradient at the dense model, so its
leading term is the Gauss-Newton form. With an independent matrix of random signs V_z a feature
point, `s = sum_z <V_z, G_z>` and gates g of ones, `E[(ds/dg_j)^2] = sum_z ||dG_z/dg_j||_F^2`,
which is MD_j to that order. KD: where a sample has few logits their Jacobian is taken and the
divergence evaluated at `y - dy/dg_j`; where it has many, `xi = sqrt(p) e - p <sqrt(p), e>`
has the covariance of their Fisher information, so `E[(d<xi, y>/dg_j)^2] = 2 KD_j`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data.base import DataBundle, Distributing
from models.base import Batch, PrunableModel, UnitGroup
from prune.gates import calibration_of, undisturbed
from prune.optin.exact import Losses, exact_losses
from prune.optin.losses import sampled
from prune.optin.precision import computed_in, in_float32
from prune.optin.teacher import Settings, observe
from utils.errors import InputError
from utils.hooks import captured, hooked
from utils.progress import progress_bar

EXACTLY = ("head",)
# random signs as a product of two thin matrices: as good as a full matrix, and cheaper to draw and to multiply
RANK = 64
# so few numbers a sample have their Jacobian taken whole
MOST_OUTPUTS = 32


def sketched_losses(
    model: PrunableModel, data: DataBundle, settings: Settings, probes: int, leak: bool = False
) -> Losses:
    """Estimate the losses of every unit, and score the heads, which are few, exactly.

    Args:
        model: The dense model; left exactly as it was.
        data: Calibration batches and the task.
        settings: See `Settings`; the seed is also that of the probes.
        probes: Random probes a batch, R.
        leak: How heads are scored, see `exact_losses`.

    Returns:
        `md`, `kd`, and `md_final` where the model has a feature point behind its last block
        (its share is then in the estimated `md`); per group (count,).
    """
    batches = calibration_of(data).calibration
    losses = exact_losses(model, data, settings, kinds=EXACTLY, leak=leak)
    groups = [group for group in model.unit_groups() if group.count and group.kind not in EXACTLY]
    generator = torch.Generator().manual_seed(settings.seed)
    precision = computed_in(settings.precision, model.device)
    with undisturbed(model.network), precision, progress_bar("optin sketch", len(batches) * probes) as advance:
        for batch in batches:
            placed = model.place(batch)
            graph = Graph(model, placed, groups, settings)
            for _ in range(probes):
                for name, values in graph.distance_probe(generator).items():
                    losses["md"][name] += values / (len(batches) * probes)
                advance("")
            for name, values in graph.deviations(data, max(4, probes // 4), generator).items():
                losses["kd"][name] += settings.temperature**2 * values / len(batches)
    return losses


class Graph:
    """One forward pass through gates of ones, a gate a sample and unit, kept for many backward passes."""

    def __init__(self, model: PrunableModel, batch: Batch, groups: Sequence[UnitGroup], settings: Settings) -> None:
        self.batch, self.groups = batch, groups
        self.last = len(model.blocks()) - 1
        samples = len(next(iter(batch.values())))
        gates = {g.name: torch.ones(samples, g.count, device=model.device, requires_grad=True) for g in groups}
        self.gates = [gates[group.name] for group in groups]
        with torch.no_grad():
            rows = observe(model, batch, settings).rows
        with torch.enable_grad(), gates_by_sample(model, gates):
            with captured(model.network, model.feature_points()) as found:
                self.logits = model.logits(batch)
            self.logits = self.logits.float()
            self.features = [sampled(found[name], rows[name])[0] for name in model.feature_points()]  # (K, d) each
        self.own = self._own_points()

    def distance_probe(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Squared response of every unit to one random probe of the Grams, (count,) each."""
        with torch.enable_grad(), in_float32(self.logits.device):
            parts = [probed(features, generator) for features in self.features]
            responses = self._gradients(torch.stack(parts).sum())
        found = {}
        for group, response in zip(self.groups, responses, strict=True):
            if group.layer in self.own:  # the layer's own point moves with the unit but does not judge it
                gate = self.gates[self.groups.index(group)]
                response = response - torch.autograd.grad(parts[group.layer], gate, retain_graph=True)[0]
            found[group.name] = response.sum(dim=0).square().float().cpu()
        return found

    def deviations(self, data: DataBundle, probes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Divergence of the logits summed over samples, (count,) each, from how they move with the gates."""
        outputs = self.logits[0].numel()
        if outputs <= MOST_OUTPUTS:
            return self._from_jacobian(data, outputs)
        logits = self._distributions(data)
        probabilities = logits.detach().softmax(dim=-1)
        logits = torch.where(probabilities > 0, logits, 0.0)  # what can't be has no share, and no gradient
        sums = {group.name: torch.zeros(group.count) for group in self.groups}
        for _ in range(probes):
            signs = _signs(probabilities.shape, generator).to(probabilities.device)
            root = probabilities.sqrt() * signs
            probe = root - probabilities * root.sum(dim=-1, keepdim=True)
            with torch.enable_grad():
                responses = self._gradients((probe * logits).sum())
            for group, response in zip(self.groups, responses, strict=True):
                sums[group.name] += response.sum(dim=0).square().float().cpu() / (2 * probes)
        return sums

    def _from_jacobian(self, data: DataBundle, outputs: int) -> dict[str, Tensor]:
        flat = self.logits.flatten(1)
        with torch.enable_grad():
            columns = [self._gradients(flat[:, output].sum()) for output in range(outputs)]
        found = {}
        for number, group in enumerate(self.groups):
            jacobian = torch.stack([column[number] for column in columns], dim=-1)  # (B, count, outputs)
            moved = (flat.detach()[:, None] - jacobian).movedim(1, 0)  # (count, B, outputs)
            given = moved.reshape(group.count, *self.logits.shape)
            found[group.name] = data.task.deviation(given, self.logits.detach(), self.batch).sum(dim=-1).float().cpu()
        return found

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
