"""Hold OPTIN's raw losses against files of the released code's, through the real adapters.

python benchmarks/optin_golden.py FILE...

Prints the largest deviation of each array and exits with 1 beyond the tolerance.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.base import Batch, Classification, DataBundle, TensorBatches
from models.base import PrunableModel
from models.bert import bert
from models.vit import vit
from prune.optin.combine import TOKEN
from prune.optin.exact import exact_losses
from prune.optin.teacher import Settings
from prune.optin.tokens import tokens_of

RTOL, ATOL = 1e-3, 1e-4
# token distances are so small that the others' tolerance says little
PATCH_ATOL = 1e-6
# what the files call our kinds of units
THEIRS = {"head": "head", "neuron": "neuron", TOKEN: "patch"}


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a golden file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def golden_model(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> PrunableModel:
    """The model that a file describes, with its weights."""
    if about["arch"] == "bert":
        sizes = {name: int(value) for name, value in about.items() if name not in ("arch", "num_labels")}
        model: PrunableModel = bert(classes=int(about["num_labels"]), settings={"model_type": "bert", **sizes})
    else:
        width, hidden = int(about["embed_dim"]), int(about["mlp_hidden"])
        sizes = {name: int(about[name]) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
        # half a neuron more, so that timm's int() of the product never falls one short
        settings = {**sizes, "mlp_ratio": (hidden + 0.5) / width}
        model = vit(
            name="deit_tiny_patch16_224", classes=int(about["num_classes"]), image_size=int(about["img_size"]),
            settings=settings,
        )  # fmt: skip
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    model.network.load_state_dict(weights)
    return model


def golden_bundle(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> DataBundle:
    """The one calibration batch of a file."""
    batch: Batch = {"inputs": tensors["in.pixel_values"]} if "in.pixel_values" in tensors else {}
    if not batch:
        ids = tensors["in.input_ids"]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    task = Classification(int(about.get("num_labels") or about["num_classes"]))
    one = {name: tensor[:1] for name, tensor in batch.items()}
    prints: dict[str, str] = {part: "golden" for part in ("train", "calibration", "validation")}
    return DataBundle("golden", "synthetic", task, [batch], TensorBatches(batch, 1), 0, [batch], one, prints)


def deviations(path: Path) -> Iterator[tuple[str, float, float]]:
    """Per array its name, the largest deviation, and the same in units of the tolerance."""
    about, tensors = read(path)
    model, data = golden_model(about, tensors), golden_bundle(about, tensors)
    with torch.inference_mode():
        yield _compared("logits", model.logits(model.place(data.calibration[0])), tensors["out.logits"])
    names = {kind: [g.name for g in model.unit_groups() if g.kind == kind] for kind in ("head", "neuron")}
    names[TOKEN] = [tokens_of(model, layer) for layer in range(len(model.blocks()))]
    held = [(kind, there) for kind, there in THEIRS.items() if f"out.{there}_md" in tensors]
    losses = exact_losses(model, data, Settings(), kinds=[kind for kind, _ in held])
    for kind, there in held:
        for term in ("md", "kd"):
            found = torch.stack([losses[term][name] for name in names[kind]])
            yield _compared(f"{there}_{term}", found, tensors[f"out.{there}_{term}"])


def _compared(name: str, found: Tensor, wanted: Tensor) -> tuple[str, float, float]:
    gap = (found - wanted).abs()
    least = PATCH_ATOL if name == "patch_md" else ATOL
    return name, float(gap.max()), float((gap / (least + RTOL * wanted.abs())).max())


def main() -> int:
    """Check every file that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    beyond = False
    for path in parser.parse_args().files:
        print(f"{path}\n  array         deviation  tolerances (rtol {RTOL:g}, atol {ATOL:g}; patch_md {PATCH_ATOL:g})")
        for name, largest, parts in deviations(path):
            print(f"  {name:<13} {largest:9.2e}  {parts:.3f}{'  BEYOND' if not parts <= 1 else ''}")
            beyond |= not parts <= 1
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main())
