"""OPTIN: mask one unit, see how far features and logits move (Khaki and Plataniotis, ICLR 2024, arXiv:2403.17921)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Scores
from prune.normalize import normalized
from prune.optin import exact, losses, sketch, trajectory
from prune.optin.combine import Loss, combined, decayed
from prune.optin.exact import Settings, exact_losses, refuse_without_trajectory
from prune.optin.search import two_kinds
from prune.optin.sketch import sketched_losses
from prune.search import select_units
from prune.structural import Structural
from utils.rules import Count, NonNegative, Positive, Seed
from utils.storage import Scratch

SEARCHED = frozenset({
    "loss", "lambda_c", "constant", "head_decay", "neuron_decay", "last_head_decay", "last_neuron_decay", "search",
    "mode", "memory_gb",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Optin(Structural):
    """Manifold distance of the features behind a unit, plus the divergence of the logits. No labels, no gradients.

    Raw losses are kept; everything from `loss` on acts at search time and hits the cache.

    Attributes:
        mode: `clean`, the method as intended.
        engine: `exact` masks every unit by itself; `sketch` estimates all of them from `probes`
            backward passes, and scores heads exactly.
        rows: Feature rows that stand for a calibration batch.
        temperature: Its square is the factor of the logits' divergence.
        probes: Random probes of the sketch.
        seed: Of the rows and the probes.
        memory_gb: What the candidates of one pass may take.
        loss: Which losses count: `md`, `kd` or `md+kd`.
        lambda_c: Weight of the logits' divergence, relative to the mean distance.
        constant: A literal weight in its place.
        head_decay: Factor on all heads.
        neuron_decay: Factor on all neurons.
        last_head_decay: Factor on the last layer's heads.
        last_neuron_decay: Factor on the last layer's neurons.
        search: `greedy` by score per cost, or `optin`, the top heads and the neurons that fit.
    """

    mode: Literal["clean"] = "clean"
    engine: Literal["exact", "sketch"] = "exact"
    rows: Count = 768
    temperature: Positive = 4.0
    probes: Count = 24
    seed: Seed = 0
    memory_gb: Positive = 4.0
    loss: Loss = "md+kd"
    lambda_c: NonNegative = 0.1
    constant: NonNegative | None = None
    head_decay: NonNegative = 1.0
    neuron_decay: NonNegative = 1.0
    last_head_decay: NonNegative = 1.0
    last_neuron_decay: NonNegative = 1.0
    search: Literal["greedy", "optin"] = "greedy"

    search_fields = Structural.search_fields | SEARCHED
    ranking_code = (exact, losses, sketch, trajectory)

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score all units; see `rank_on`."""
        return self.rank_on(model, data, None)

    def rank_on(self, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Raw losses of all units, gone on with at the last finished layer.

        Raises:
            InputError: If the model has no feature points, or there is no calibration data.
        """
        refuse_without_trajectory(model)
        settings = Settings(self.rows, self.temperature, self.seed, self.memory_gb)
        if self.engine == "exact":
            return Scores(exact_losses(model, data, settings, scratch))
        return Scores(sketched_losses(model, data, settings, self.probes))

    def combine(self, model: PrunableModel, scores: Scores) -> Mapping[str, Tensor]:
        """Weigh the losses against each other."""
        groups, layers = model.unit_groups(), len(model.blocks())
        joined = combined(scores.terms, groups, layers, self.loss, self.lambda_c, self.constant)
        last = {"head": self.last_head_decay, "neuron": self.last_neuron_decay}
        return decayed(joined, groups, layers, {"head": self.head_decay, "neuron": self.neuron_decay}, last)

    def select(self, scores: Mapping[str, Tensor], costs: CostModel) -> dict[str, Tensor]:
        """Kept units by the chosen search."""
        search = two_kinds if self.search == "optin" else select_units
        return search(normalized(scores, self.normalize), costs, self._budget)
