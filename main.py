"""pare: prune a pretrained transformer for real, and measure it dense and pruned.

python main.py                               # the toy encoder on handwritten digits
python main.py prune=taylor prune.ratio=0.6  # another method, another ratio
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from prune.optin.published_config import expanded
from utils.cli import command, exit_codes, launch
from utils.from_python import configured, dated_folder
from utils.garbage import for_good
from utils.launched import speaks
from utils.secrets import redacted

if TYPE_CHECKING:
    from evals.report import Record

CONFIGS = Path(__file__).parent / "configs"


def run(
    cfg: DictConfig | Mapping[str, Any], out: Path | str | None = None, command: str = "python main.py"
) -> "Record":
    """Score a model's units, keep the best within a budget, cut the rest away, recover, measure dense and pruned.

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
    # torch is imported only now, so that help and mistakes in the configuration answer at once
    from evals.report import Record
    from prune import recipe
    from prune.rounds import in_rounds
    from utils.environment import versions
    from utils.joining import joined
    from utils.seed import deterministic
    from utils.storage import Store

    out = dated_folder() if out is None else Path(out)
    if speaks():
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(redacted(OmegaConf.to_yaml(cfg, resolve=True)), encoding="utf-8")
    record, store = Record.begin(cfg, versions(), command), Store(Path(cfg.storage))
    with record.kept_in(out), joined(cfg.device), deterministic(cfg.get("deterministic", False)) as record.undetermined:
        with record.phase("load"):
            parts = recipe.loaded(cfg, record, store)
        with record.phase("train"):
            model = recipe.trained(cfg, parts, record, store)
        done = in_rounds(
            parts.method, parts.recovery, model, parts.data, store, parts.costs, cfg.seed, record,
            partial(record.keep, out), parts.priced,
        )  # fmt: skip
        record.recovery = done.recovered
        if cfg.save and speaks():
            with record.phase("recover"):
                record.saved = recipe.saved(done.recovered.model, out)
        with record.phase("evaluate"), record.watched():
            recipe.measured(cfg, parts, model, done, record, store)
        if speaks():
            recipe.drawn(cfg, parts, model, done, record, out)
    return record


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> tuple[float, ...] | None:
    """Run one job, print what it found, and return what a search goes by."""
    with for_good(first="torch" not in sys.modules):
        import prune.recipe  # noqa: F401 what `run` needs
        from evals.objectives import objectives
        from evals.terminal import print_record

    out = Path(HydraConfig.get().runtime.output_dir)
    with exit_codes():
        record = run(cfg, out, command())
        if speaks():
            print_record(record, out)
        return objectives(record, HydraConfig.get().sweeper)


if __name__ == "__main__":
    launch(main, CONFIGS, expanded)
