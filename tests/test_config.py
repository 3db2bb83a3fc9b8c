"""Every mistake is found before anything heavy is imported, all at once, with its key and rule."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from utils.check import find_problems
from utils.cli import parse_command_line
from utils.compose import CommandLine, JobComposer, command_line_problems
from utils.composing import ComposedOnce

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


def problems(*arguments: str) -> list[str]:
    line = parse_command_line(list(arguments), CONFIGS)
    assert line is not None
    return command_line_problems(line)


GROUPS = {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in CONFIGS.iterdir() if group.is_dir()}


# no labels for the default model to count
READERS = {
    "data=squad": ["model=bert"],
    **{f"data={source}": ["model=tiny_llama"] for source in ("c4", "pydoc", "wikitext2")},
    "data=text": ["model=tiny_llama", f"data.root={ROOT}"],
}


@pytest.mark.parametrize("option", [f"{g}={o}" for g, options in GROUPS.items() for o in options if o[0] != "_"])
def test_every_shipped_option_composes_and_checks(option: str) -> None:
    group, name = option.split("=")
    argument = {"evals": f"evals=[{name}]", "experiment": f"+{option}"}.get(group, option)
    assert problems(argument, *READERS.get(option, [])) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_yaml_starts_with_its_command(path: Path) -> None:
    if path.name.startswith("_"):
        return
    head = [line for line in path.read_text().splitlines()[:2] if not line.startswith("# @package")]
    assert head[0].startswith("# python main.py")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("prune.ratio=0",),
        ("prune=none",),
        ("evals=[]",),
        ("evals=[accuracy,latency]", "evals.latency.batch=2"),
        ("~evals.latency",),
        ("+experiment=tokens_speed", "prune=random"),
        ("-m", "prune.ratio=0.1,0.2", "prune=taylor,fisher"),
        ("-m", "prune.ratio=range(0.1,0.4,0.1)", "model.heads=choice(2,4)"),
        ("-m", "+experiment=glob(*)"),
        ("+experiment=tiny_llama_benchmark", "evals=[generation]"),  # sets more of decode and energy
        ("hydra.run.dir=elsewhere", "hydra.job_logging.root.level=ERROR"),
        ("model.image_size=null", "model.tokens=4", "model.token_width=2"),
        ("prune.budget=params", "prune.min_keep=0", "prune.round_to=8", "prune.normalize=lamp"),
    ],
)
def test_right_command_lines_have_no_problem(arguments: tuple[str, ...]) -> None:
    assert problems(*arguments) == []


def test_settings_wait_for_their_metric_but_not_for_one_that_nobody_knows() -> None:
    cfg = OmegaConf.create({"evals": {"decode": {"seconds": 1}, "acuracy": {"batch": 2}}})
    found = [problem for problem in find_problems(cfg, ["decode", "accuracy"]) if problem.startswith("evals")]
    assert len(found) == 1 and found[0].startswith("evals.acuracy={batch}: must be one of the options of evals")


CASES = [
    (("prune.sparsit=0.3",), ["prune.sparsit=0.3: prune=fisher has no key 'sparsit'", "ratio"]),
    (("prune.rati=0.3",), ["did you mean 'ratio'?"]),
    (("+prune.rati=0.3",), ["prune.rati=0.3: prune.rankers.fisher.Fisher takes no 'rati'; did you mean 'ratio'?"]),
    (("sed=1",), ["sed=1: the configuration has no key 'sed'; did you mean 'seed'?"]),
    (("seed=abc",), ["seed=abc: must be a whole number"]),
    (("seed=-1",), ["seed=-1: must be in [0, 4294967295]"]),
    (("seed=1.5",), ["seed=1.5: must be a whole number"]),
    (("save=maybe",), ["save=maybe: must be true or false"]),
    (("device=tpu",), ["device=tpu: must be one of auto, cpu, cuda"]),
    (("dtype=float16",), ["dtype=float16: must be one of auto, float32, bfloat16"]),
    (("prune.ratio=high",), ["prune.ratio=high: must be a finite number"]),
    (("prune.ratio=true",), ["prune.ratio=true: must be a finite number"]),
    (("prune.ratio=nan",), ["prune.ratio=nan: must be a finite number"]),
    (("prune.ratio=1",), ["prune.ratio=1: must be in [0, 1)"]),
    (("prune.ratio=-0.1",), ["prune.ratio=-0.1: must be in [0, 1)"]),
    (("prune.ratio=null",), ["prune.ratio=null: must be a finite number"]),
    (("prune.budget=flops",), ["prune.budget=flops: must be one of macs, params, width, latency"]),
    (("prune.normalize=l2",), ["prune.normalize=l2: must be one of none, mean, max, rank, lamp"]),
    (("prune.min_keep=-1",), ["prune.min_keep=-1: must be at least 0"]),
    (("prune.round_to=0",), ["prune.round_to=0: must be at least 1"]),
    (("prune=taylor", "prune.variant=third"), ["prune.variant=third: must be one of batch, signed, abs"]),
    (
        ("prune=nope",),
        ["prune=nope: prune has no option 'nope'; ", "there is: ", "optin, optin_tau, pare, random"],
    ),
    (("prune=fischer",), ["did you mean 'fisher'?"]),
    (
        ("evals=[accuracy,nosuch]",),
        ["evals has no option 'nosuch'; there is: accuracy, ancestor_counts, byte_perplexity"],
    ),
    (("evals=[latenc]",), ["did you mean 'latency'?"]),
    (
        ("evals=[accuracy]", "evals.latency.batch=1"),
        ["latency is not among the selected evals; select it: evals=[accuracy,latency]"],
    ),
    (("evals=[accuracy]", "+evals=latency"), ["+evals=latency: has no effect", "write evals=[accuracy,latency]"]),
    (("evals.latency.batch=0",), ["evals.latency.batch=0: must be at least 1"]),
    (("prune=none", "prune.ratio=0.3"), ["prune.ratio=0.3: prune=none takes no 'ratio' and no other key"]),
    (("experiment=tokens_speed",), ["an experiment is added with a plus: +experiment=tokens_speed"]),
    (("+experiment=nope",), ["experiment has no option 'nope'; there is: bert_kwon, bert_optin"]),
    (("model.width=48.5",), ["model.width=48.5: must be a whole number"]),
    (("model.training.epochs=0",), ["model.training.epochs=0: must be at least 1"]),
    (("model.training.lr=1",), ["model.training has no key 'lr'"]),
    (("model.checkpoint=/nowhere",), ["model.checkpoint=/nowhere: must be an existing file or folder"]),
    (("storage=/dev/null/x",), ["storage=/dev/null/x: must be a writable folder (/dev/null is not a folder)"]),
    (("data.classes=???",), ["data.classes: no value given"]),
    (("model.classes=${data.clases}",), ["model.classes", "data.clases"]),
    (("prune._target_=prune.rankers.fisher.Fischer",), ["has no 'Fischer'"]),
    (("prune._target_=prune.nowhere.Fisher",), ["module 'prune' has no 'nowhere'"]),
    (("prune.ratio=0.1,0.2",), ["prune.ratio=0.1,0.2: several values need a sweep, with -m"]),
    (("prune.ratio",), ["prune.ratio: cannot be read; it must be key=value"]),
    (("prune.ratio = 0.4",), ["prune.ratio = 0.4: cannot be read"]),
    (("prune.ratio=é",), ["quote values with spaces or special characters"]),
    (("prune=[fisher,taylor]",), ["prune=[fisher,taylor]: prune takes one option"]),
    (("prune=_structural",), ["prune has no option '_structural'"]),
    (("model=5",), ["model=5"]),
    (("~prune._target_",), ["must be one of the options of prune, a mapping with a _target_"]),
    (("storage=",), ["storage=: must be a folder's path"]),
    (("model.checkpoint=" + 5000 * "x",), ["(5000 characters): must be an existing file or folder"]),
    (("prune.ratio='\"0.4\"'",), ['prune.ratio="0.4": must be a finite number']),
    (("seed.x=1",), ["seed.x=1: seed is a single value and has no 'x'"]),
    (("+sed=1",), ["sed=1: the configuration has no key 'sed'; did you mean 'seed'?"]),
    (("prune=null",), ["prune=null: prune has no option"]),
    (("evals.quality=null",), ["evals.quality=null: must be one of the options of evals"]),
    (("evals=null",), ["evals"]),
    (("model=bert", "data=glue", "data.task=SST-2"), ["data.task=SST-2: must be one of mnli, qqp"]),
    (("model.dropout=5",), ["model.dropout=5: must be in [0, 1)"]),
    (("prune.ratio=${prune.ratio}",), ["prune.ratio"]),
    (("data.classes=7",), ["data.classes=7: must be one of 10"]),
    (("--config-dir", "/nowhere"), ["--config-dir=/nowhere: must be an existing folder"]),
    (("-m", "prune.ratio=0.1,1.5", "prune=fisher,random"), ["prune.ratio=1.5: must be in [0, 1)"]),
]


@pytest.mark.parametrize(("arguments", "parts"), CASES, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_one_mistake_gives_one_clear_message(arguments: tuple[str, ...], parts: list[str]) -> None:
    found = problems(*arguments)
    assert len(found) == 1, found
    assert all(part in found[0] for part in parts), found[0]


def test_all_mistakes_are_listed_at_once() -> None:
    found = problems(
        "prune.sparsit=1", "prune.ratio=1.5", "seed=abc", "evals=[nosuch]", "model=foo", "data.batch_size=0"
    )
    wanted = ("prune.sparsit", "prune.ratio=1.5", "seed=abc", "nosuch", "model=foo", "data.batch_size=0")
    assert len(found) == len(wanted)
    assert all(any(part in problem for problem in found) for part in wanted)


def test_third_party_keys_and_targets_are_welcome(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "thirdparty_method.py").write_text(
        "import torch\nfrom prune.structural import Structural\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Structural):\n"
        "    strength: int = 1\n    start: torch.Tensor = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    (tmp_path / "extra" / "prune").mkdir(parents=True)
    (tmp_path / "extra" / "prune" / "mine.yaml").write_text(
        "defaults: [_structural]\n_target_: thirdparty_method.Mine\nstrength: 2\n"
    )
    extra = ("--config-dir", str(tmp_path / "extra"), "prune=mine")
    assert problems(*extra) == []
    assert problems(*extra, "prune.strength=x", "prune.ratio=2") == [
        "prune.ratio=2: must be in [0, 1)",
        "prune.strength=x: must be a whole number",
    ]
    assert "thirdparty_method" not in sys.modules, "checking must not import"


def test_the_check_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from utils.compose import *\n"
        "line = CommandLine(Path('configs'), overrides=['prune.ratio=2', '+prune.x=1'])\n"
        "assert len(command_line_problems(line)) == 2\n"
        "heavy = {'torch', 'numpy', 'timm', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_commands_that_only_show_are_not_checked() -> None:
    for flag in (["--help"], ["--cfg", "job"], ["--info", "all"], ["-sc", "install=bash"], ["--hydra-help"]):
        assert parse_command_line([*flag, "nonsense=1"], CONFIGS) is None


def test_a_saved_configuration_can_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\nseed: -3\n")
    line = parse_command_line(["-cp", str(tmp_path), "-cn", "config"], CONFIGS)
    assert line is not None and line == CommandLine(config_dir=tmp_path)
    assert any("seed=-3" in problem for problem in command_line_problems(line))


SHARED = [
    [],
    ["prune.ratio=0.2"],
    ["prune.ratio=0.4", "seed=3"],
    ["prune.ratio=0.4", "prune=taylor", "prune.variant=abs"],
    ["evals=[accuracy,latency]", "evals.latency.batch=2", "~evals.accuracy", "+evals.latency.more=1"],
    ["data.classes=${model.heads}", "+model.x={a: [1, 2]}", "hydra.run.dir=elsewhere"],
    ["prune.ratio=0.1", "prune={ratio: 0.7}"],
    ["prune={ratio: 0.7}", "prune.ratio=0.1"],
]


def test_jobs_that_share_options_are_composed_as_hydra_composes_them() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        shared = JobComposer("config")
        for job in [*SHARED, *reversed(SHARED)]:  # twice, so that no job may have changed what is shared
            expected = compose("config", job)
            assert OmegaConf.to_container(shared(job)) == OmegaConf.to_container(expected), job
        assert len(shared.shared) < len(SHARED), "nothing was shared"
        with pytest.raises(Exception, match="Could not override 'prune.nope'"):
            shared(["prune.nope=1"])


def test_no_job_of_a_sweep_is_kept_or_shared() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = compose("config", [], return_hydra_config=True)
        loader.load_sweep_config = once = ComposedOnce(loader)  # type: ignore[method-assign]
        first, other = (loader.load_sweep_config(master, [f"prune.ratio={ratio}"]) for ratio in (0.2, 0.4))
        assert (first.prune.ratio, other.prune.ratio) == (0.2, 0.4)
        sent = pickle.loads(pickle.dumps(loader))
        assert sent.load_sweep_config.shared == {}, "sent along to every worker"
        assert sent.load_sweep_config(master, ["prune.ratio=0.3"]).prune.ratio == 0.3
        again = loader.load_sweep_config(master, ["prune.ratio=0.2"])
        assert again.prune == first.prune and again.prune is not first.prune, "a launched job may change its own"
        assert len(once.shared) == 1, "kept by options, not by job"
