"""What a command does not import at its start: torch's compiler takes as long as torch itself."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
import torch
from models.limits import _Counting, bounded_building
with bounded_building("model", most_bytes=10**9):
    torch.nn.Linear(8, 8)
with _Counting("model", 10**9) as counting:
    torch.nn.Conv2d(1, 8, 2)
assert (counting.tensors, counting.total) == (2, 4 * (8 * 4 + 8)), "sizes are still counted"
found = [name for name in ("torch._dynamo", "sympy") if name in sys.modules]
print("imported:", found)
"""


def test_building_a_model_imports_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "imported: []"
