import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchnnfs
import torchnnfs.testing

ROOT = Path(torchnnfs.__file__).parent
# Each module may import only from those that stand further down.
LAYERS = [
    "torchnnfs.__main__",
    "torchnnfs",
    "torchnnfs.testing",
    "torchnnfs.testing.comparison",
    "torchnnfs.testing.page",
    "torchnnfs.testing.html",
    "torchnnfs.testing.plot",
    "torchnnfs.testing.report",
    "torchnnfs.testing.run",
    "torchnnfs.testing.batches",
    "torchnnfs.testing.outcome",
    "torchnnfs.testing.controls",
    "torchnnfs.testing.gradients",
    "torchnnfs.testing.judge",
    "torchnnfs.testing.merge",
    "torchnnfs.testing.problem",
    "torchnnfs.testing.exact",
    "torchnnfs.testing.measure",
    "torchnnfs.testing.inputs",
    "torchnnfs.testing.golden",
    "torchnnfs.testing.files",
    "torchnnfs.testing.environment",
    "torchnnfs.testing.candidates",
    "torchnnfs.testing.traces",
    "torchnnfs.testing.processes",
    "torchnnfs.testing.reference",
    "torchnnfs.testing.models",
    "torchnnfs.testing.estimate",
    "torchnnfs.testing.layers.dense",
    "torchnnfs.testing.layers.reshape",
    "torchnnfs.testing.layers.normalise",
    "torchnnfs.testing.layers.softmax",
    "torchnnfs.testing.layers.pointwise",
    "torchnnfs.testing.layers",
    "torchnnfs.testing.values",
    "torchnnfs.testing.precision",
    "torchnnfs.fused",
    "torchnnfs.kernel",
    "torchnnfs.book",
    "torchnnfs.objects",
    "torchnnfs.kept",
    "torchnnfs.arithmetic",
    "torchnnfs.classes",
    "torchnnfs.modules",
    "torchnnfs.spiral",
    "torchnnfs.streams",
    "torchnnfs.checks",
    "torchnnfs.version",
    "torchnnfs._signals",
]
FILES = sorted(ROOT.rglob("*.py"))
WITHOUT_TORCH = [ROOT / "testing" / "precision.py", *(ROOT / "testing" / "layers").glob("*.py")]


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree):
    """What a file imports anywhere: in functions and for type checkers alone, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in within if name in LAYERS] or [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_its_place():
    assert sorted(map(name_of, FILES)) == sorted(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    name = name_of(path)
    for imported in imports(ast.parse(path.read_text())):
        if imported.startswith("torchnnfs"):
            assert LAYERS.index(imported) > LAYERS.index(name), f"{name} imports {imported}"


def test_imports_for_type_checkers_and_in_functions_count():
    tree = ast.parse("if TYPE_CHECKING:\n    from a import b\ndef f():\n    import c\n")
    assert list(imports(tree)) == ["a", "c"]


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=name_of)
def test_formulas_and_bounds_know_no_torch(path):
    assert "torch" not in {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}


@pytest.mark.parametrize("path", sorted([*FILES, *ROOT.rglob("*.cpp")]), ids=lambda path: path.name)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("package", [torchnnfs, torchnnfs.testing])
def test_init_holds_a_sorted_all_and_nothing_else(package):
    assert package.__all__ == sorted(package.__all__)
    docstring, *rest = ast.parse(Path(package.__file__).read_text()).body
    assert isinstance(docstring, ast.Expr)
    if package is torchnnfs:
        assert ast.unparse(rest.pop(0)) == "import torchnnfs._signals"
    assert [type(node) for node in rest] == [ast.ImportFrom] * (len(rest) - 1) + [ast.Assign]
    imported = {alias.name for node in rest[:-1] for alias in node.names}
    assert imported == set(package.__all__)


def test_importing_seeds_nothing_patches_nothing_and_starts_no_gpu():
    code = """if True:
        import numpy as np, torch
        before = np.dot, np.zeros, np.eye, np.random.randn, np.random.get_state()[1].tolist()
        torchs = torch.random.get_rng_state()
        import torchnnfs
        after = np.dot, np.zeros, np.eye, np.random.randn, np.random.get_state()[1].tolist()
        assert before == after
        assert torch.equal(torchs, torch.random.get_rng_state())
        assert not torch.cuda.is_initialized()
    """
    subprocess.run([sys.executable, "-c", code], check=True)
