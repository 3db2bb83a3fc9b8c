"""MLflow: runs in a local database file, or on a server by its address."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from evals.tracking import curves_of, figures_of, pictures, refuse_missing, settings_of

LONGEST_VALUE = 500


@dataclass(frozen=True, kw_only=True)
class MLflow:
    """Parameters, metrics, learning curves and artifacts of each run.

    Attributes:
        uri: Where MLflow keeps runs: `sqlite:///<file>`, or a server's address; null: `mlflow.db` here.
        experiment: Name under which runs are listed.
    """

    uri: str | None = None
    experiment: str = "pare"

    def __post_init__(self) -> None:
        refuse_missing("mlflow", "mlflow")

    def log(self, result: Mapping[str, Any], out: Path) -> None:
        """Log one run."""
        mlflow: Any = import_module("mlflow")
        mlflow.set_tracking_uri(self.uri or f"sqlite:///{os.path.abspath('mlflow.db')}")
        mlflow.set_experiment(self.experiment)
        with mlflow.start_run(run_name=result["name"]):
            mlflow.log_params({name: f"{value}"[:LONGEST_VALUE] for name, value in settings_of(result).items()})
            mlflow.set_tags({"status": result["status"], "command": result["command"][:LONGEST_VALUE]})
            for name, value in figures_of(result).items():
                mlflow.log_metric(name, value)
            for name, epoch, value in curves_of(result):
                mlflow.log_metric(name, value, step=epoch)
            for path in [out / "result.json", out / "report.html", *pictures(out)]:
                if path.is_file():
                    mlflow.log_artifact(str(path), "plots" if path.suffix == ".png" else None)
