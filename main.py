"""pare: prune a pretrained transformer for real, and measure it dense and pruned.

python main.py                               # the toy encoder on handwritten digits
python main.py prune=taylor prune.ratio=0.6  # another method, another ratio
"""

from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prune.optin.published_config import expanded
from utils.cli import command, exit_codes, launch
from utils.config import build

if TYPE_CHECKING:
    from evals.report import Record

# what a component from anywhere must be able to do
METHOD, RECOVERY, METRIC = ("check", "rank", "plan", "apply"), ("recover",), ("measure",)


def run(cfg: DictConfig, out: Path, command: str = "python main.py") -> "Record":
    """Score a model's units, keep the best within a budget, cut the rest away, measure both.

    Args:
        cfg: The composed configuration.
        out: Folder for everything the run leaves behind.
        command: What to type to repeat it.
    """
    # torch is imported only now, so that help and mistakes in the configuration answer at once
    from data.base import prepared
    from evals.evaluate import evaluate
    from evals.plots import draw_plots
    from evals.report import Record
    from models.checkpoint import how_to_load, save_model
    from models.checks import refuse_misfit, refuse_non_finite, refuse_untrained
    from models.cost import cost_model
    from models.pretrained import with_weights
    from prune.ranking import ranked
    from prune.rewriting import applied
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
            source, model = build(cfg.data), build(cfg.model)
            data = prepared(source, model)
            record.source_notes = (model.notes, data.notes, getattr(method, "notes", ()))
            model.network.to(device)
            refuse_untrained(model)
            refuse_misfit(model, data)
            metrics = {name: build(node, METRIC) for name, node in cfg.evals.items()}
            record.method = method.name
            costs = cost_model(model, data.example)
            method.check(costs)
        with record.phase("train"):
            model, record.history = with_weights(model, data, store, cfg.seed)
            model.network.to(dtype_of(cfg.dtype, model.dtype))
            refuse_non_finite(model)
        with record.phase("rank"):
            ranking = ranked(method, model, data, store)
            record.note(model, data, ranking)
        with record.phase("search"):
            record.plan = plan = method.plan(model, ranking.scores, costs)
            plan.save(out / "plan.json")
        with record.phase("cut"):
            done = applied(method, model, plan, data, store)
            pruned, plan = done.model, done.plan
            record.note_applied(done)
            plan.save(out / "plan.json")
        with record.phase("recover"):
            recovered = recovery.recover(pruned, model, data, store, cfg.seed)
            pruned, record.recovery = recovered.model, recovered
            if cfg.save:
                record.saved = how_to_load(save_model(pruned, out / "model"))
        with record.phase("evaluate"):
            models = [model] if pruned is model else [model, pruned]
            for found in evaluate(models, data, metrics, store):
                record.add(found)
        record.plots = draw_plots(plan, ranking.scores, record.history, recovered.history, out)
    return record


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one job and print what it found."""
    from evals.terminal import print_record

    out = Path(HydraConfig.get().runtime.output_dir)
    with exit_codes():
        print_record(run(cfg, out, command()), out)


if __name__ == "__main__":
    launch(main, Path(__file__).parent / "configs", expanded)
