"""pare: prune a pretrained transformer for real, and measure it dense and pruned.

python main.py                               # the toy encoder on handwritten digits
python main.py prune=taylor prune.ratio=0.6  # another method, another ratio
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prune.optin.published_config import expanded
from utils.cli import command, exit_codes, launch
from utils.config import build
from utils.from_python import configured, dated_folder

if TYPE_CHECKING:
    from evals.report import Record

# what a component from anywhere must be able to do
METHOD, RECOVERY, METRIC, TRACKER = ("check", "rank", "plan", "apply"), ("recover",), ("measure",), ("log",)


CONFIGS = Path(__file__).parent / "configs"


def run(
    cfg: DictConfig | Mapping[str, Any], out: Path | str | None = None, command: str = "python main.py"
) -> "Record":
    """Score a model's units, keep the best within a budget, cut the rest away, measure both.

    Args:
        cfg: The composed configuration, or an ordinary dictionary of overrides, which is composed and checked as the
            command line is: `run({"experiment": "digits_optin", "prune.ratio": 0.4})`.
        out: Folder for everything the run leaves behind; None: one named after the moment, in outputs/.
        command: What to type to repeat it; for a dictionary it is found out.

    Raises:
        InputError: If the configuration or an input is wrong.
        RunError: If the run fails.
    """
    if not isinstance(cfg, DictConfig):
        cfg, command = configured(cfg, CONFIGS, expanded)
    out = dated_folder() if out is None else Path(out)
    # torch is imported only now, so that help and mistakes in the configuration answer at once
    from data.base import prepared
    from evals.base import refuse_unmeasurable
    from evals.evaluate import evaluate
    from evals.plots import draw_plots
    from evals.report import Record
    from evals.summary import draw_summary, leave_sensitivity
    from evals.token_pictures import draw_token_plots
    from models.checkpoint import how_to_load, save_model
    from models.checks import refuse_misfit, refuse_non_finite, refuse_untrained
    from models.cost import cost_model
    from models.pretrained import with_weights
    from models.visiting import settle
    from prune.latency import with_latency
    from prune.rewriting import refuse_unreachable
    from prune.rounds import in_rounds
    from utils.environment import describe_device, dtype_of, resolve_device, versions
    from utils.seed import seed_everything
    from utils.storage import Store

    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, out / "config.yaml", resolve=True)
    record, store = Record.begin(cfg, versions(), command), Store(Path(cfg.storage))
    with record.kept_in(out):
        with record.phase("load"):
            device = resolve_device(cfg.device)
            record.device = describe_device(device)
            seed_everything(cfg.seed)
            method, recovery = build(cfg.prune, METHOD), build(cfg.recover, RECOVERY)
            record.tracker = build(cfg.tracker, TRACKER)
            source, model = build(cfg.data), build(cfg.model)
            data = prepared(source, model, store)
            record.source_notes = (model.notes, data.notes, getattr(method, "notes", ()))
            settle(model, device, getattr(method, "offload", False))
            refuse_untrained(model)
            refuse_misfit(model, data)
            metrics = {name: build(node, METRIC) for name, node in cfg.evals.items()}
            refuse_unmeasurable(metrics, model, data)
            record.method = method.name
            costs = cost_model(model, data.example)
            costs = with_latency(method, costs, model, data, store, dtype_of(cfg.dtype, model.dtype))
            refuse_unreachable(method, model, costs)
        with record.phase("train"):
            model, record.history = with_weights(model, data, store, cfg.seed)
            model.network.to(dtype_of(cfg.dtype, model.dtype))
            refuse_non_finite(model)
        priced = partial(with_latency, method, data=data, store=store, dtype=dtype_of(cfg.dtype, model.dtype))
        keep = partial(record.keep, out)
        done = in_rounds(method, recovery, model, data, store, costs, cfg.seed, record, keep, priced)
        plan, pruned, record.recovery = done.plan, done.recovered.model, done.recovered
        with record.phase("recover"):
            if cfg.save:
                record.saved = how_to_load(save_model(pruned, out / "model"))
        with record.phase("evaluate"), record.watched():
            between = [done.cut] if cfg.summary and done.cut is not pruned else []
            models = [model] if pruned is model else [model, *between, pruned]
            for found in evaluate(models, data, metrics, store):
                record.add(found)
        record.plots = draw_plots(plan, done.ranking.scores, record.history, done.recovered.history, out)
        record.plots += draw_token_plots(pruned, data, record.pruned, out)
        found, record.sections = leave_sensitivity(plan, out)
        record.plots += found + (draw_summary(model, done.cut, pruned, plan, out) if cfg.summary else [])
    return record


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job and print what it found."""
    from evals.terminal import print_record

    out = Path(HydraConfig.get().runtime.output_dir)
    with exit_codes():
        print_record(run(cfg, out, command()), out)


if __name__ == "__main__":
    launch(main, CONFIGS, expanded)
