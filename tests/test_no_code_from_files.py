"""Nothing in the tree can run what a file or a configuration says: the whole source is scanned for ways to do so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("data", "models", "prune", "evals", "utils", "hydra_plugins", "benchmarks", "tests")
# what a call may be named by its last parts; a bare name is a builtin
DANGEROUS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load",
    "marshal.loads", "shelve.open", "np.load", "numpy.load", "np.fromfile", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "pandas.read_pickle", "torch.hub.load", "torch.jit.load", "shutil.unpack_archive",
    "tarfile.open", "zipfile.ZipFile", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
METHODS = {"extractall", "extract", "read_pickle", "unsafe_load"}
SUPERCLASSES = {"pickle.Unpickler"}
# (file, what) -> why it is no danger; each is to be used, so that the list never grows stale
ALLOWED = {
    ("models/checkpoint.py", "torch.load"): "weights_only=True",
    ("models/checkpoint.py", "zipfile.ZipFile"): "only sizes of its parts are read, nothing is unpacked",
    ("prune/optin/unpickled.py", "torch.load"): "weights_only=True",
    ("prune/optin/unpickled.py", "pickle.Unpickler"): "knows three names and refuses every other",
    ("data/cifar_files.py", "pickle.Unpickler"): "knows plain values and arrays and refuses every other name",
    ("utils/signature.py", "eval"): "annotations in source files, of names and types alone, without builtins",
    ("utils/signature.py", "compile"): "the same",
    ("utils/compose.py", "pickle.loads"): "copies of what this process has composed; they stay in its memory",
    ("utils/composing.py", "pickle.loads"): "copies of what this process has read; they stay in its memory",
    ("utils/cli.py", "pickle.loads"): "of what the same line has just pickled: does an error survive it",
}


def called(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every dangerous use in one file, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if called(base) in SUPERCLASSES:
                    yield called(base), node.lineno
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill", "cloudpickle", "shelve"):
            yield f"from {node.module} import", node.lineno
        if not isinstance(node, ast.Call):
            continue
        name = called(node.func)
        if name in DANGEROUS:
            yield name, node.lineno
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield node.func.attr, node.lineno
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for key in ("shell", "trust_remote_code", "allow_pickle"):
            value = given.get(key)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{key}=", node.lineno


def found() -> dict[tuple[str, str], list[int]]:
    places: dict[tuple[str, str], list[int]] = {}
    files = [ROOT / "main.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    for path in files:
        for what, line in uses(ast.parse(path.read_text(encoding="utf-8"))):
            places.setdefault((path.relative_to(ROOT).as_posix(), what), []).append(line)
    return places


def test_the_tree_has_no_other_way_to_run_code() -> None:
    everything = {key: lines for key, lines in found().items() if not key[0].startswith("tests/")}
    assert everything.keys() == ALLOWED.keys(), everything.keys() ^ ALLOWED.keys()


def test_tensors_are_loaded_as_weights_only() -> None:
    for name in {name for name, what in ALLOWED if what == "torch.load"}:
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and called(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{name}:{node.lineno}"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("torch.load(path)", "torch.load"), ("eval(text)", "eval"), ("pickle.loads(content)", "pickle.loads"),
        ("np.load(path, allow_pickle=True)", "allow_pickle="), ("archive.extractall(place)", "extractall"),
        ("subprocess.run(line, shell=True)", "shell="), ("from pickle import loads", "from pickle import"),
        ("AutoModel.from_pretrained(x, trust_remote_code=asked)", "trust_remote_code="),
        ("class Reader(pickle.Unpickler): ...", "pickle.Unpickler"), ("yaml.load(text, Loader)", "yaml.load"),
    ],
)  # fmt: skip
def test_the_scan_sees(code: str, what: str) -> None:
    assert what in {name for name, _ in uses(ast.parse(code))}


def test_the_scan_passes_over_what_is_harmless() -> None:
    assert not list(uses(ast.parse("model.eval(); yaml.safe_load(x); f(x, trust_remote_code=False); json.loads(x)")))
