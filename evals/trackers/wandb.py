"""Weights & Biases: offline files by default, which `wandb sync` uploads when wanted."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from evals.tracking import curves_of, figures_of, pictures, refuse_missing


@dataclass(frozen=True, kw_only=True)
class WandB:
    """Configuration, summary, learning curves and plots of each run.

    Attributes:
        project: Name under which runs are listed.
        mode: `offline` writes files into the run's folder; `online` needs an account.
    """

    project: str = "pare"
    mode: Literal["offline", "online"] = "offline"

    def __post_init__(self) -> None:
        refuse_missing("wandb", "wandb")

    def log(self, result: Mapping[str, Any], out: Path) -> None:
        """Log one run."""
        wandb: Any = import_module("wandb")
        run = wandb.init(
            project=self.project, name=result["name"], mode=self.mode, dir=str(out), config=dict(result["config"])
        )
        for name, epoch, value in curves_of(result):
            run.log({name: value, f"{name.partition('/')[0]}/epoch": epoch})
        run.log({path.stem: wandb.Image(str(path)) for path in pictures(out)})
        run.summary.update(figures_of(result) | {"status": result["status"]})
        run.finish(exit_code=0 if result["status"] == "ok" else 1)
