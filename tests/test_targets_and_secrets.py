"""What a configuration may call, and that no token or password reaches anything that is kept or printed."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import CONFIGS, SMALL, Command
from tests.test_config import problems
from utils.check import find_problems
from utils.secrets import covered, redacted, secret_values, why_secret, why_secret_key
from utils.targets import engine_refusals, is_model_builder, why_refused

TOKEN = "hf_" + "QuiteSecretIndeed" * 2
PLAIN = "just-my-own-wandb-value"


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("os.system", "prune"), ("subprocess.run", "model"), ("shutil.rmtree", "tracker"), ("builtins.eval", "data"),
        ("importlib.import_module", "model.training"), ("torch.load", "model"), ("torch.hub.load", "model"),
        ("numpy.load", "data"), ("transformers.pipeline", "model"), ("hydra.utils.instantiate", "prune"),
        ("utils.files.write_atomically", "prune"), ("models.checkpoint.save_model", "evals.x"),
        ("evals.sweep.rebuild", "evals.x"), ("evals.compare.main", "evals.x"), ("utils.cli.launch", "recover"),
        ("data.digits.digits", "prune"), ("prune.rankers.fisher.Fisher", "model"),
        ("evals.sweep.SweepReport", "tracker"),
        ("utils.hub.from_cache_or_hub", "data.calibration"), (["os", "system"], "prune"), (5, "prune"),
    ],
)  # fmt: skip
def test_what_is_no_component_is_refused(target: object, path: str) -> None:
    assert (why_refused(target, path) or "").startswith("must be ")


def shipped() -> list[tuple[str, str]]:
    """Targets of the shipped options, and where they stand."""
    found = []
    for group in ("model", "data", "prune", "recover", "tracker", "evals"):
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            plain: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            nodes = plain if group == "evals" else {"": plain}
            found += [(n["_target_"], f"{group}.{k}".rstrip(".")) for k, n in nodes.items() if "_target_" in (n or {})]
    return found


def test_shipped_components_may_be_called() -> None:
    everything = shipped()
    assert len(everything) > 50
    assert {place: why for place in everything if (why := why_refused(*place))} == {}


def test_a_module_of_ones_own_may_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_parts.py").write_text(
        "from os import system\nimport shutil\ndef made(*, classes: int = 2): ...\n"
        "def said() -> None: ...\nclass Odd:\n    def measure(self, subjects): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert why_refused("my_own_parts.made", "model") is None
    assert why_refused("my_own_parts.Odd", "evals.odd") is None
    for target, path in (("Odd", "tracker"), ("said", "data"), ("system", "prune")):
        assert why_refused(f"my_own_parts.{target}", path), target
    assert "my_own_parts" not in sys.modules, "checking must not import"


@pytest.mark.parametrize(
    "node",
    [
        {"callbacks": {"x": {"_target_": "shutil.rmtree", "path": "/"}}},
        {"callbacks": {"x": {"_target_": "hydra.utils.instantiate"}}},
        {"launcher": {"_target_": "subprocess.run"}},
        {"sweeper": {"_target_": "${oc.env:X}"}},
        {"job_logging": {"handlers": {"x": {"()": "os.system", "command": "true"}}}},
        {"hydra_logging": {"handlers": {"x": {"class": "subprocess.Popen"}}}},
        {"job_logging": {"handlers": {"x": {"stream": "ext://os.environ"}}}},
    ],
)
def test_what_hydra_would_call_is_looked_at(node: dict) -> None:
    assert len(list(engine_refusals(node))) == 1


def test_hydras_own_parts_may_be_called() -> None:
    core = "hydra._internal.core_plugins"
    node = {
        "launcher": {"_target_": f"{core}.basic_launcher.BasicLauncher"},
        "callbacks": {"sweep": {"_target_": "evals.sweep.SweepReport"}},
        "job_logging": {"handlers": {"x": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}},
    }
    assert list(engine_refusals(node)) == []


def test_manifests_may_name_builders_alone() -> None:
    assert is_model_builder("models.toy_encoder.toy_encoder")
    assert not any(map(is_model_builder, ("models.x.y", "os.system", "models.checkpoint.shutil.rmtree")))


@pytest.fixture
def with_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", PLAIN)
    monkeypatch.setenv("SHELLS", "/bin/bash")


def test_secrets_are_told_by_name_and_shape(with_secrets: None) -> None:
    assert {TOKEN, PLAIN} <= set(secret_values()) and "/bin/bash" not in secret_values()
    assert secret_values({"TOKENIZERS_PARALLELISM": "false-ish", "MONKEY": "banana-split", "A_TOKEN": "1234567"}) == ()
    text = f"a {TOKEN} b {PLAIN} c https://anna:pass@host/x?api_key=abc d"
    assert redacted(text) == "a *** b *** c https://***@host/x?api_key=*** d"
    assert covered({"a": [TOKEN, 1], TOKEN: None}) == {"a": ["***", 1], "***": None}
    for harmless in ("a plain text", "file:///a/b@c", "https://huggingface.co/x", "key=value", "models.vit.vit"):
        assert redacted(harmless) == harmless and why_secret(harmless) is None


@pytest.mark.parametrize(
    "override",
    [
        f"model.checkpoint={TOKEN}", f"+model.x={PLAIN}", "+model.x=${oc.env:HF_TOKEN}",
        "+model.x=${oc.env:MY_KEY,none}",
        "tracker=mlflow +tracker.uri=http://anna:pass@host", "+tracker.api_key=abc", f"+model.{TOKEN}=1",
        "hydra.job.env_set.MY_PASSWORD=abc", f"hydra.run.dir=/tmp/{TOKEN}", f"prune.ratio {TOKEN}",
    ],
)  # fmt: skip
def test_a_secret_is_refused_and_not_repeated(override: str, with_secrets: None) -> None:
    found = "\n".join(problems(*override.split(" ")))
    assert found and not any(part in found for part in (TOKEN, PLAIN, "anna:pass", "=abc"))


def test_keys_that_are_secrets() -> None:
    assert why_secret_key("tracker.api_key", "x") and why_secret_key("hydra.job.env_set.HF_TOKEN", "x")
    for key in ("model.settings.num_key_value_heads", "data.tokens", "evals.decode.prompt_tokens", "tracker.api_key"):
        assert why_secret_key(key, None if key.startswith("tracker") else "x") is None


def test_a_secret_that_comes_by_another_name_is_seen(with_secrets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNOCENT", f"see {PLAIN}")
    cfg = OmegaConf.create({"model": {"_target_": "models.vit.vit", "name": "${oc.env:INNOCENT}"}})
    found = [problem for problem in find_problems(cfg) if problem.startswith("model.name")]
    assert found and "token or key" in found[0] and PLAIN not in found[0]


def test_logs_are_covered_without_losing_them(with_secrets: None, caplog: pytest.LogCaptureFixture) -> None:
    from utils import secrets

    before, streams = logging.getLogRecordFactory(), (sys.stdout, sys.stderr)
    try:
        secrets.cover_output()
        logging.getLogger("x").warning("with %s inside", TOKEN)
    finally:
        logging.setLogRecordFactory(before)
        sys.stdout, sys.stderr = streams
    assert "with *** inside" in caplog.text and TOKEN not in caplog.text


SPILLING = '''
import logging, os
from prune.rankers.random import Random
class Spilling(Random):
    """Prints and logs the token, and fails with it in its message where it is told to."""
    def check(self, costs):
        token = os.environ["HF_TOKEN"]
        print("print", token)
        logging.getLogger("spilling").warning("log %s", token)
        if os.environ.get("FAIL"):
            raise ValueError("https://anna:" + token + "@hub/x")
'''


@pytest.mark.parametrize("fails", ["1", pytest.param("", marks=pytest.mark.slow)])
def test_no_file_and_no_line_of_a_run_holds_the_token(fails: str, forked: Command, tmp_path: Path) -> None:
    (tmp_path / "spilling.py").write_text(SPILLING)
    environment = {"HF_TOKEN": TOKEN, "MY_API_KEY": PLAIN, "PYTHONPATH": str(tmp_path), "FAIL": fails}
    small = ("evals=[macs]", "save=true", *(s for s in SMALL if not s.startswith("evals.")))
    given = (*small, "prune=random", "prune._target_=spilling.Spilling", f"hydra.run.dir={tmp_path}/out")
    done = forked(*given, f"storage={tmp_path}/storage", cwd=tmp_path, **environment)
    assert (done.returncode != 0) == bool(fails), done.stderr
    files = [path for folder in ("out", "storage") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert any(path.name == "result.json" for path in files)
    for place, content in [("streams", (done.stdout + done.stderr).encode()), *((p, p.read_bytes()) for p in files)]:
        assert TOKEN.encode() not in content and PLAIN.encode() not in content, place
    assert "print ***" in done.stdout and "log ***" in done.stdout + done.stderr
