"""No call in the packages can run what a file holds; pickles are read by `convert.unpickle`, which runs nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "rae_scale", ROOT / "kernels/rae_kernels")

FORBIDDEN = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load",
    "cloudpickle.loads", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pandas.read_pickle",
}  # fmt: skip
ARCHIVES = {"extract", "extractall", "unpack_archive"}  # of tarfile, zipfile and shutil: they write where members say
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "UniqueKeyLoader"}


def dangers(source: str) -> list[str]:
    """Calls in `source` that could run or unpack what they are given, each as "line: call"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        loader = given.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else None)
        if (
            name in FORBIDDEN
            or name.rpartition(".")[2] in ARCHIVES
            or (name == "yaml.load" and loader not in SAFE_LOADERS)
            or given.get("shell") == "True"
            or given.get("allow_pickle") == "True"
            or given.get("weights_only") == "False"
            or given.get("trust_remote_code", "False") != "False"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_nothing_runs_or_unpacks_what_it_reads(package: Path) -> None:
    files = sorted(package.rglob("*.py"))
    assert len(files) > 10
    found = [f"{path.relative_to(ROOT)}:{call}" for path in files for call in dangers(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=cfg.trust)",
        "eval(text)",
    ],
)
def test_the_search_finds_each_kind(line: str) -> None:
    assert dangers(f"def f():\n    return {line}")


@pytest.mark.parametrize("line", ["yaml.load(text, UniqueKeyLoader)", "model.eval()", "torch.compile(module)"])
def test_the_search_leaves_the_harmless_alone(line: str) -> None:
    assert not dangers(line)
