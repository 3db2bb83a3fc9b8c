"""A ranker, a data set, a metric and a model from outside the repository, swept over."""

import json
from pathlib import Path

from tests.conftest import Command
from tests.test_sweep import rows_of

CODE = {
    "outside_ranker.py": '''
from dataclasses import dataclass
import torch
from prune.base import Scores
from prune.structural import Structural
from utils.rules import Positive

@dataclass(frozen=True, kw_only=True)
class Last(Structural):
    """Keeps the last units of every group."""
    power: Positive = 1.0

    def rank(self, model, data):
        return Scores({"last": {g.name: torch.arange(1.0, g.count + 1) ** self.power for g in model.unit_groups()}})
''',
    "outside_data.py": '''
import torch
from data.base import Classification, DataBundle, TensorBatches, calibration_batches, fingerprint_of

def stripes(*, classes: int = 3, samples: int = 60, seed: int = 0):
    """Images of one bright column; the label says which third it lies in."""
    columns = torch.arange(samples) % 6
    images = torch.zeros(samples, 1, 6, 6)
    images[torch.arange(samples), 0, :, columns] = 1.0
    tensors = {"inputs": images, "labels": columns // 2}
    print_of = fingerprint_of(*tensors.values(), seed)
    return DataBundle(
        name="stripes", domain="synthetic", task=Classification(classes),
        calibration=calibration_batches(tensors, 2, 10, seed),
        train=TensorBatches(tensors, 20, shuffle_seed=seed), train_samples=samples,
        validation=TensorBatches(tensors, 30), example={"inputs": images[:1]},
        fingerprints={"train": print_of, "calibration": print_of, "validation": print_of},
    )
''',
    "outside_metric.py": '''
from dataclasses import dataclass
from evals.base import Measurement

@dataclass(frozen=True)
class Confidence:
    """Mean probability of the predicted class."""

    def measure(self, subjects):
        return [{"confidence": Measurement(self.mean(subject), "fraction")} for subject in subjects]

    def mean(self, subject):
        tops = [logits.softmax(-1).amax(-1) for logits, _ in subject.predictions]
        return float(sum(top.sum() for top in tops) / sum(len(top) for top in tops))
''',
    "outside_model.py": """
from torch import nn, relu
from models.base import Consumer, PrunableModel, Recipe, UnitGroup, rows, unit_index
from utils.training import Training

class Perceptron(nn.Module):
    def __init__(self, inputs, neurons, classes):
        super().__init__()
        self.hidden, self.out = nn.Linear(inputs, neurons), nn.Linear(neurons, classes)

    def forward(self, x):
        return self.out(relu(self.hidden(x.flatten(1))))

class PrunablePerceptron(PrunableModel):
    def unit_groups(self):
        index = unit_index(self.network.hidden.out_features, 1)
        consumer = Consumer("out", -1, index)
        return (UnitGroup("hidden", "neuron", 0, len(index), 1, rows(self.network, "hidden", index), consumer),)

    def blocks(self):
        return ("hidden",)

    def feature_points(self):
        return ("hidden",)

    def logits(self, batch):
        return self.network(batch["inputs"])

def perceptron(*, inputs: int, neurons: int = 16, classes: int, training: Training | None = None):
    recipe = Recipe("outside_model.perceptron", dict(inputs=inputs, neurons=neurons, classes=classes))
    return PrunablePerceptron(Perceptron(inputs, neurons, classes), recipe, training)
""",
}
YAML = {
    "prune/last.yaml": "defaults: [_structural]\n_target_: outside_ranker.Last\npower: 2.0\n",
    "data/stripes.yaml": "_target_: outside_data.stripes\nclasses: 3\nseed: ${seed}\n",
    "evals/confidence.yaml": "confidence:\n  _target_: outside_metric.Confidence\n",
    "model/perceptron.yaml": (
        "_target_: outside_model.perceptron\ninputs: 36\nneurons: 12\nclasses: ${data.classes}\n"
        "training: {_target_: utils.training.Training, epochs: 3}\n"
    ),
}


def test_everything_can_come_from_outside(forked: Command, tmp_path: Path) -> None:
    for folder, files in (("code", CODE), ("configs", YAML)):
        for name, text in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    chosen = ("model=perceptron", "data=stripes", "evals=[accuracy,confidence,macs]")
    given, place = ("--config-dir", str(tmp_path / "configs")), {"PYTHONPATH": str(tmp_path / "code")}

    swept = ("-m", *chosen, "prune=last,fisher", "prune.ratio=0.25,0.5", "prune.budget=width")
    done = forked(*given, *swept, cwd=tmp_path, **place)
    assert done.returncode == 0, done.stderr
    (sweep,) = tmp_path.glob("multirun/*/*")
    rows = rows_of(sweep)
    assert [row["method"] for row in rows] == ["last", "last", "fisher", "fisher"]
    assert all(row["pruned_confidence"] and row["status"] == "ok" for row in rows)
    plan = json.loads((sweep / "1" / "plan.json").read_text())
    assert plan["groups"][0]["kept_units"] == [6, 7, 8, 9, 10, 11]

    mistakes = ("prune=last", "prune.power=0", "prune.pover=1", "model.inputs=x")
    wrong = forked(*given, *chosen, *mistakes, cwd=tmp_path, **place)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    for part in ("prune.power=0: must be above 0", "did you mean 'power'?", "model.inputs=x: must be a whole number"):
        assert part in wrong.stderr
