"""What the sentence of main.py is made of: what a run starts with, what it measures, and what it draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from data.base import DataBundle, prepared
from evals.base import Metric, refuse_unmeasurable
from evals.evaluate import evaluate
from evals.plots import draw_plots
from evals.report import Record
from evals.score_summary import score_summary
from evals.segmentation_pictures import draw_segmentations
from evals.summary import draw_summary, leave_sensitivity
from evals.token_pictures import draw_token_plots
from models.base import PrunableModel
from models.checkpoint import how_to_load, save_model
from models.checks import refuse_misfit, refuse_non_finite, refuse_untrained
from models.cost import CostModel, cost_model
from models.limits import bounded_building
from models.pretrained import with_weights
from models.visiting import settle
from prune.base import Method
from prune.latency import with_latency
from prune.recovery.base import Recovery
from prune.rewriting import refuse_unreachable
from prune.rounds import Outcome
from utils.check import is_selected
from utils.config import build
from utils.distributed import described
from utils.environment import describe_device, dtype_of, resolve_device
from utils.progress import progress_bar
from utils.seed import seed_everything
from utils.storage import Store

# what a component from anywhere must be able to do
METHOD, RECOVERY, METRIC, TRACKER = ("check", "rank", "plan", "apply"), ("recover",), ("measure",), ("log",)


@dataclass(frozen=True)
class Loaded:
    """All that a run starts with; whatever can be refused before any work has been.

    Attributes:
        model: The dense model, with its weights.
        data: Its data.
        method: What chooses.
        recovery: What trains afterwards.
        metrics: What is measured, by name.
        costs: Of the dense model.
        priced: Adds to the costs of a model what a budget needs beyond MACs and parameters.
    """

    model: PrunableModel
    data: DataBundle
    method: Method
    recovery: Recovery
    metrics: dict[str, Metric]
    costs: CostModel
    priced: Callable[..., CostModel]


def loaded(cfg: DictConfig, record: Record, store: Store) -> Loaded:
    """Build every part of a configuration, and refuse what can't be done before anything is computed.

    Raises:
        InputError: If parts do not fit each other, or a budget can't be reached.
    """
    device = resolve_device(cfg.device)
    record.device = describe_device(device) | described()
    record.joules.begin(device, cfg.get("joules", "counters"))
    seed_everything(cfg.seed)
    method, recovery = build(cfg.prune, METHOD), build(cfg.recover, RECOVERY)
    record.method, record.tracker = method.name, build(cfg.tracker, TRACKER)
    source = build(cfg.data)
    with bounded_building("model"):
        model = build(cfg.model)
    # parts of it may be read by one process alone, when a metric asks
    data = prepared(source, model, replace(store, joint=False))
    record.source_notes = (model.notes, data.notes, getattr(method, "notes", ()))
    settle(model, device, getattr(method, "offload", False))
    refuse_untrained(model)
    refuse_misfit(model, data)
    metrics = {name: build(node, METRIC) for name, node in cfg.evals.items() if is_selected(node)}
    refuse_unmeasurable(metrics, model, data)
    priced = partial(with_latency, method, data=data, store=store, dtype=dtype_of(cfg.dtype, model.dtype))
    costs = priced(costs=cost_model(model, data.example), model=model)
    refuse_unreachable(method, model, costs)
    return Loaded(model, data, method, recovery, metrics, costs, priced)


def trained(cfg: DictConfig, parts: Loaded, record: Record, store: Store) -> PrunableModel:
    """The dense model with weights: its own, or those of a training that storage keeps."""
    model, record.history = with_weights(parts.model, parts.data, store, cfg.seed)
    model.network.to(dtype_of(cfg.dtype, model.dtype))
    refuse_non_finite(model)
    return model


def measured(cfg: DictConfig, parts: Loaded, model: PrunableModel, done: Outcome, record: Record, store: Store) -> None:
    """Measure dense and pruned, and with `summary=true` also what recovery started from."""
    pruned = done.recovered.model
    between = [done.cut] if cfg.summary and done.cut is not pruned else []
    models = [model] if pruned is model else [model, *between, pruned]
    found = evaluate(models, parts.data, parts.metrics, store)
    # some metrics run a clock: nothing may draw meanwhile
    with progress_bar("evaluate", len(parts.metrics), still=True) as advance:
        for name, of_models in zip(parts.metrics, found, strict=True):
            record.add(of_models)
            advance(name)


def saved(pruned: PrunableModel, out: Path) -> str:
    """Write the pruned model; returns what loads it."""
    return how_to_load(save_model(pruned, out / "model"))


def drawn(cfg: DictConfig, parts: Loaded, model: PrunableModel, done: Outcome, record: Record, out: Path) -> None:
    """Draw what there is to draw."""
    plan, pruned = done.plan, done.recovered.model
    record.scores = score_summary(plan, done.ranking.scores)
    record.plots = draw_plots(plan, done.ranking.scores, record.history, done.recovered.history, out)
    record.plots += draw_token_plots(pruned, parts.data, record.pruned, out)
    record.pictures = draw_segmentations({"dense": model, "pruned": pruned}, parts.data, out)
    found, record.sections = leave_sensitivity(plan, out)
    record.plots += found + (draw_summary(model, done.cut, pruned, plan, out) if cfg.summary else [])
