"""No tracker: a run's own folder says everything."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Nothing:
    """Logs nothing."""

    def log(self, result: Mapping[str, Any], out: Path) -> None:
        """Leave it at the run's own files."""
