"""What the jobs of a sweep share is composed once, and each is exactly what Hydra makes of it by itself."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from utils.composing import ComposedOnce, KeptRepository, read_once

CONFIGS = Path(__file__).parent.parent / "configs"
JOBS = [
    [],
    ["prune.ratio=0.2", "prune=taylor", "storage=elsewhere"],
    ["prune.ratio=0.4", "seed=3", "prune=taylor"],
    ["prune=taylor", "prune.ratio=0.4"],
    ["prune=taylor", "prune.variant=abs", "model.width=${model.heads}"],
    ["+experiment=digits_finetune", "recover.epochs=2", "+prune.more={a: [1, 2]}"],
    ["evals=[accuracy,latency]", "evals.latency.batch=2", "~evals.accuracy"],
    ["prune.ratio=0.1", "prune={ratio: 0.7}"],
    ["prune={ratio: 0.7}", "prune.ratio=0.1"],
    ["name='a=b, c'", "device=cpu", "tracker=none"],
]


@pytest.fixture
def loader() -> Iterator[ConfigLoader]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def told(node: Any) -> Any:
    """All of a node: raw values, keys in order, types and flags."""
    if not isinstance(node, DictConfig | ListConfig):
        return node._value(), type(node), node._metadata.ref_type, node._metadata.flags
    own = (type(node), node._metadata.ref_type, node._metadata.object_type, node._metadata.flags)
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return own, node._value()
    keys = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    return own, [(key, told(node._get_node(key))) for key in keys]  # type: ignore[arg-type]


@pytest.mark.parametrize("hydra", [[], ["+hydra.job.env_set.A=b", "hydra.sweep.dir=there"]], ids=["plain", "set"])
def test_jobs_are_to_the_last_flag_what_hydra_composes(loader: ConfigLoader, hydra: list[str]) -> None:
    assert isinstance(loader, ConfigLoaderImpl)
    master = compose("config", hydra, return_hydra_config=True)
    expected = [loader.load_sweep_config(master, job) for job in JOBS]
    read_once(loader)
    once = ComposedOnce(loader)
    for job, whole in [*zip(JOBS, expected, strict=True), *zip(JOBS, expected, strict=True)]:
        found = once(master, job)
        assert told(found) == told(whole), job
        found.hydra.job.num = 7  # what a launched job changes is its own
        found.seed = 99
    assert 0 < len(once.shared) < len(JOBS), "nothing was shared"
    assert told(once(master, JOBS[2])) != told(expected[1]), "the comparison sees nothing"


def test_what_is_wrong_is_said_as_by_hydra(loader: ConfigLoader) -> None:
    master = compose("config", [], return_hydra_config=True)
    wrong = [["prune.nope=1"], ["prune=nope"], ["seed=x"], ["prune.ratio=0.1,0.2"], ["+prune.ratio=1"], ["a.b=1"]]
    for job in wrong:
        with pytest.raises(HydraException) as plain:
            loader.load_sweep_config(master, job)
        with pytest.raises(HydraException) as ours:
            ComposedOnce(loader)(master, job)
        assert str(ours.value) == str(plain.value), job


def test_each_source_is_read_once_and_given_out_as_a_copy(loader: ConfigLoader, monkeypatch: Any) -> None:
    assert isinstance(loader, ConfigLoaderImpl)
    expected = told(compose("config", ["prune=taylor"], return_hydra_config=True))
    read_once(loader)
    opened: list[str] = []
    kind = type(loader.repository.sources[1])
    load = kind.load_config
    monkeypatch.setattr(
        kind, "load_config", lambda self, config_path: opened.append(config_path) or load(self, config_path)
    )
    for _ in range(3):
        assert told(compose("config", ["prune=taylor"], return_hydra_config=True)) == expected
    assert "config" in opened and len(opened) == len(set(opened))
    result = loader.repository.load_config("config")
    assert result is not None
    OmegaConf.update(result.config, "name", "changed")
    assert loader.repository.load_config("config").config.name == "default"  # type: ignore[union-attr]
    options = loader.get_group_options("prune")
    options.clear()
    assert "taylor" in loader.get_group_options("prune")


def test_another_search_path_is_another_place(loader: ConfigLoader, tmp_path: Path) -> None:
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "own.yaml").write_text("_target_: nowhere\nratio: 0.5\n")
    read_once(loader)
    with pytest.raises(HydraException):
        compose("config", ["prune=own"])
    assert compose("config", ["prune=own", f"hydra.searchpath=[file://{tmp_path}]"]).prune.ratio == 0.5
    with pytest.raises(HydraException):
        compose("config", ["prune=own"])


def test_a_loader_is_sent_without_what_it_read(loader: ConfigLoader) -> None:
    assert isinstance(loader, ConfigLoaderImpl)
    read_once(loader)
    master = compose("config", [], return_hydra_config=True)
    once = ComposedOnce(loader)
    once(master, ["prune.ratio=0.2"])
    sent = pickle.loads(pickle.dumps(once))
    assert isinstance(sent.loader.repository, KeptRepository)
    assert sent.loader.repository.kept == {} and sent.shared == {}
    assert OmegaConf.select(sent(master, ["prune.ratio=0.3"]), "prune.ratio") == 0.3
