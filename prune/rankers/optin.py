"""OPTIN: mask one unit, see how far features and logits move (Khaki and Plataniotis, ICLR 2024, arXiv:2403.17921)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from data.base import DataBundle
from models.base import PrunableModel
from models.cost import CostModel
from prune.base import Method, Plan, Scores
from prune.optin import candidates, exact, graph, losses, precision, sketch, teacher, tokens, trajectory
from prune.optin.combine import Loss, combined, decayed
from prune.optin.compat import why_not_counted
from prune.optin.exact import exact_losses
from prune.optin.facts import facts_of, has_pads
from prune.optin.precision import Precision
from prune.optin.published import PUBLISHED, content_hash, find_published, published_scores
from prune.optin.published_config import from_published
from prune.optin.released import Released, released_plan
from prune.optin.sketch import sketched_losses
from prune.optin.teacher import Settings, refuse_without_trajectory
from prune.structural import Structural
from utils.errors import InputError
from utils.rules import Count, ExistingPath, NonNegative, Positive, Seed
from utils.storage import Scratch

CODE = (candidates, exact, graph, losses, precision, sketch, teacher, tokens, trajectory)
SEARCHED = frozenset({
    "loss", "lambda_c", "constant", "head_decay", "neuron_decay", "token_decay", "last_head_decay",
    "last_neuron_decay", "token_envelope", "aggregate", "head_final", "neuron_final", "memory_gb",
    "published",
})  # fmt: skip
# so few units, each once a calibration batch, are masked one by one in seconds
FEW_PASSES = 2048


@dataclass(frozen=True, kw_only=True)
class Optin(Structural):
    """Manifold distance of the features behind a unit, plus the divergence of the logits. No labels, no gradients.

    Raw losses are kept; everything from `loss` on acts at search time and hits the cache.

    Attributes:
        mode: `clean`, the method as intended; or `compat`, which selects as the released code
            does, quirks included, and reads `ratio` as a fraction of the encoder's MACs.
        engine: `exact` masks every unit by itself; `sketch` estimates all of them from `probes`
            backward passes, and scores heads exactly. `auto` is exact in compat mode and where
            that takes few passes (units times calibration batches), else sketch.
        rows: Feature rows that stand for a calibration batch.
        temperature: Its square is the factor of the logits' divergence.
        probes: Random probes of the sketch.
        seed: Of the rows and the probes.
        precision: What passes are computed in: `float32`, `tf32` (on CUDA), or `bfloat16`.
        memory_gb: What the candidates of one pass may take.
        rankings: Folder with rankings that the authors published, instead of scoring anything;
            these are final, so that `loss` to `token_envelope` do not act on them.
        published: Configuration file of the authors, from which the other settings were taken.
        loss: Which losses count: `md`, `kd` or `md+kd`.
        lambda_c: Weight of the logits' divergence, relative to the mean distance.
        constant: A literal weight in its place (clean mode).
        head_decay: Factor on all heads.
        neuron_decay: Factor on all neurons.
        token_decay: Factor on all token positions.
        last_head_decay: Factor on the last layer's heads.
        last_neuron_decay: Factor on the last layer's neurons; in compat mode on its tokens, too.
        token_envelope: Factor on token distances that grows from 1 to this over the layers (compat mode).
        aggregate: Whether distances are sums or means over the Gram (compat mode).
        head_final: Whether heads of the last layer are judged by its own feature point (compat mode).
        neuron_final: The same for neurons.
    """

    mode: Literal["clean", "compat"] = "clean"
    engine: Literal["auto", "exact", "sketch"] = "auto"
    rows: Count = 768
    temperature: Positive = 4.0
    probes: Count = 24
    seed: Seed = 0
    precision: Precision = "float32"
    memory_gb: Positive = 4.0
    rankings: ExistingPath | None = None
    published: ExistingPath | None = None
    loss: Loss = "md+kd"
    lambda_c: NonNegative = 0.1
    constant: NonNegative | None = None
    head_decay: NonNegative = 1.0
    neuron_decay: NonNegative = 1.0
    token_decay: NonNegative = 1.0
    last_head_decay: NonNegative = 1.0
    last_neuron_decay: NonNegative = 1.0
    token_envelope: Positive = 1.0
    aggregate: Literal["sum", "mean"] = "sum"
    head_final: bool = True
    neuron_final: bool = True

    search_fields = Structural.search_fields | SEARCHED
    ranking_code = CODE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "compat" and self.lambda_c == 0 and self.loss == "md+kd":
            raise InputError("prune.lambda_c=0: must be above 0 in compat mode, which divides by it; or prune.loss=md")
        if self.mode == "compat" and self.budget != "macs":
            raise InputError(f"prune.budget={self.budget}: must be macs in compat mode")
        if self.mode == "compat" and (self.steps > 1 or self.allocation is not None):
            raise InputError(f"prune.steps={self.steps}, prune.allocation={self.allocation}: need prune.mode=clean")

    @property
    def notes(self) -> list[str]:
        """What the published configuration asked for and does not get."""
        return [] if self.published is None else from_published(Path(self.published)).notes

    def check(self, costs: CostModel) -> None:
        """Refuse a ratio that the floors make unreachable; the released search knows no floors."""
        if self.mode == "clean":
            super().check(costs)

    def ranking_settings(self) -> dict[str, Any]:
        """All settings but those used at search time; published rankings by their content, and nothing else."""
        if self.rankings is not None:
            return {"rankings": content_hash(Path(self.rankings))}
        names = [f.name for f in fields(self) if f.name not in self.search_fields | {"rankings"}]
        return {name: getattr(self, name) for name in names}

    def resolved(self, root: Path, model: PrunableModel, data: DataBundle) -> "Optin":
        """Choose the engine; and take published rankings where the released code looks for them (compat mode)."""
        few = sum(group.count for group in model.unit_groups()) * len(data.calibration) <= FEW_PASSES
        chosen = "exact" if few or self.mode == "compat" else "sketch"
        method = replace(self, engine=chosen) if self.engine == "auto" else self
        if self.mode == "compat" and (why := why_not_counted(model)):
            raise InputError(f"prune.mode=compat: {why}; use prune.mode=clean")
        if self.mode == "clean" or self.rankings is not None:
            return method
        found = find_published(root, data.domain, data.name, model.name)
        return method if found is None else replace(method, rankings=str(found))

    def base(self, model: PrunableModel, data: DataBundle) -> Method | None:
        """Compat mode starts from the clean raw scores where no padding tells the two apart."""
        if self.mode == "clean" or self.rankings is not None or has_pads(data):
            return None
        return clean_units(self)

    def rank_from(self, base: Scores, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Score the heads anew, behind the masks that the released code leaves in place."""
        return with_leaked_heads(base, exact_losses(model, data, self._settings(), scratch, ["head"], leak=True), model)

    def rank(self, model: PrunableModel, data: DataBundle) -> Scores:
        """Score all units; see `rank_on`."""
        return self.rank_on(model, data, None)

    def rank_on(self, model: PrunableModel, data: DataBundle, scratch: Scratch | None) -> Scores:
        """Raw losses of all units, gone on with at the last finished layer.

        Raises:
            InputError: If the model has no feature points, or there is no calibration data.
        """
        refuse_without_trajectory(model)
        facts, leak = facts_of(model, data, self.rows), self.mode == "compat"
        if self.rankings is not None:
            found = published_scores(Path(self.rankings), model, facts["tokens"])
            note = f"The scores are the published ranking in {self.rankings}: final, so that no weight or decay acts."
            return Scores(found.terms, facts | {"note": note})
        if self.engine == "sketch":
            return Scores(sketched_losses(model, data, self._settings(), self.probes, leak), facts)
        return Scores(exact_losses(model, data, self._settings(), scratch, leak=leak), facts)

    def combine(self, model: PrunableModel, scores: Scores) -> Mapping[str, Tensor]:
        """Weigh the losses against each other (clean rule); published scores are final."""
        if PUBLISHED in scores.terms:
            return scores.terms[PUBLISHED]
        groups, layers = self._scored(model), len(model.blocks())
        joined = combined(scores.terms, groups, layers, self.loss, self.lambda_c, self.constant)
        return decayed(joined, groups, layers, *self._decays())

    def plan(self, model: PrunableModel, scores: Scores, costs: CostModel) -> Plan:
        """Keep the best units within the budget."""
        if self.mode == "compat":
            return released_plan(model, scores, costs, self._released())
        return super().plan(model, scores, costs)

    def _scored(self, model: PrunableModel) -> tuple[Any, ...]:
        return model.unit_groups()

    def _settings(self) -> Settings:
        pads = self.mode == "compat"
        return Settings(self.rows, self.temperature, self.seed, self.memory_gb, self.precision, pads)

    def _decays(self) -> tuple[dict[str, float], dict[str, float]]:
        return (
            {"head": self.head_decay, "neuron": self.neuron_decay, "token": self.token_decay},
            {"head": self.last_head_decay, "neuron": self.last_neuron_decay},
        )

    def _released(self) -> Released:
        """What the released search is given."""
        by_kind, last = self._decays()
        return Released(
            ratio=self.ratio,
            loss=self.loss,
            lambda_c=self.lambda_c,
            by_kind=by_kind,
            last_layer=last | {"token": self.last_neuron_decay},
            envelope=self.token_envelope,
            mean=self.aggregate == "mean",
            final={"head": self.head_final, "neuron": self.neuron_final},
        )


def clean_units(method: Optin, **changed: Any) -> Optin:
    """OPTIN's clean scoring of heads and neurons with the same ranking settings."""
    kept = {f.name: getattr(method, f.name) for f in fields(Optin) if f.name not in Optin.search_fields}
    return Optin(**(kept | {"mode": "clean", "rankings": None, "memory_gb": method.memory_gb} | changed))


def with_leaked_heads(base: Scores, leaked: Mapping[str, Mapping[str, Tensor]], model: PrunableModel) -> Scores:
    """The base's raw losses with those of heads replaced."""
    heads = [group.name for group in model.unit_groups() if group.kind == "head"]
    terms = {term: {**base.terms[term], **{name: leaked[term][name] for name in heads}} for term in base.terms}
    return Scores(terms, base.facts)
