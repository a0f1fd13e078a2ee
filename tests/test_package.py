"""What importing the package costs, and which module may import which."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest

import rwkv_miss
from tests.processes import run_process

PACKAGE = Path(rwkv_miss.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The parts of the package from the lowest to the highest: each may import those below it, and itself.
LAYERS = [
    {"errors"},
    {"config", "files", "progress", "threads"},
    {"plain_reads"},
    {"checkpoint", "fingerprints", "ops"},
    {"model"},
    {"adapters"},
    {"export", "generation", "doctor", "describe"},
    {"training"},
    {"planning", "previewing"},
    {"merging", "evaluating", "serving"},
    {"benchmarks"},
    {"commands"},
    {"cli", "harness"},
    {"__main__"},
]
# The part `data` is not in these layers: what it may import, and which parts may import it.
DATA_MAY_IMPORT = {"errors", "config", "files", "data"}
MAY_IMPORT_DATA = {
    *("data", "training", "previewing", "generation", "evaluating", "serving", "commands", "benchmarks", "harness")
}
# What the command line needs before it imports torch.
LIGHT = [
    *("rwkv_miss.cli", "rwkv_miss.training.start", "rwkv_miss.training.checks", "rwkv_miss.adapters.method"),
    "rwkv_miss.evaluating.scoring",
]


def imported_by(path: Path) -> set[str]:
    """Full names of everything that a file imports, inside functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(module: str) -> str:
    """`rwkv_miss.ops.wkv7` -> `ops`; the empty string for the package itself."""
    return module.split(".")[1] if module.count(".") else ""


def output_of(code: str) -> str:
    result = run_process([sys.executable, "-c", code], timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    heavy = "torch", "lightning", "deepspeed", "numpy", "transformers", "peft", "safetensors", "tokenizers"
    assert output_of(f"import sys, rwkv_miss; print(*set(sys.modules) & set({heavy}))") == ""


@pytest.mark.parametrize("module", LIGHT)
def test_what_comes_before_a_run_imports_no_torch(module):
    assert output_of(f"import sys, {module}; print(*set(sys.modules) & {{'torch', 'lightning', 'deepspeed'}})") == ""


def test_the_package_tells_its_public_names():
    assert set(rwkv_miss.__all__) <= set(dir(rwkv_miss))


@pytest.mark.slow
def test_importing_every_module_compiles_nothing(tmp_path):
    """No compiler can be found, the cache is empty, and stays so."""
    names = [n for n in MODULES if not n.endswith("__main__")]
    if importlib.util.find_spec("lm_eval") is None:
        names.remove("rwkv_miss.harness.model")  # which alone cannot be without its extra
    output_of(
        f"import importlib, os\nos.environ.update(XDG_CACHE_HOME={str(tmp_path)!r}, CXX='/none', PATH='/none')\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    assert list(tmp_path.iterdir()) == []


def test_public_names():
    assert sorted(rwkv_miss.__all__) == rwkv_miss.__all__
    for name in rwkv_miss.__all__:
        value = getattr(rwkv_miss, name)
        assert value.__name__ == name and value.__module__.startswith("rwkv_miss.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rwkv_miss.nothing


@pytest.mark.slow
def test_merge_is_the_function_whatever_was_imported_before():
    """A submodule of that name would be bound in its place as soon as anything imports it."""
    before = [
        "pass",
        "rwkv_miss.MergeReport",
        "importlib.import_module(sys.modules[rwkv_miss.merge.__module__].__name__)",
        "import rwkv_miss.cli, rwkv_miss.evaluating.evaluate, rwkv_miss.training.run; rwkv_miss.load_model",
    ]
    code = f"""
import importlib, sys, torch
for before in {before}:
    for name in [n for n in sys.modules if n.split(".")[0] == "rwkv_miss"]:
        del sys.modules[name]
    import rwkv_miss
    exec(before)
    print(type(rwkv_miss.merge).__name__)
"""
    assert output_of(code).split() == ["function"] * len(before)


def test_the_layers_name_every_part():
    assert {part(m) for m in MODULES} - {"", "data"} == set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_the_direction_of_imports(module):
    own = part(module)
    found = {name for name in imported_by(MODULES[module]) if name.startswith("rwkv_miss.") and part(name) != own}
    # `from rwkv_miss import __version__` and the public names are the package's own; data is beside the layers.
    parts = {part(name) for name in found} - {"__version__", *rwkv_miss.__all__} | {
        part(f"rwkv_miss.{rwkv_miss._HOMES[part(name)]}") for name in found if part(name) in rwkv_miss._HOMES
    }
    if own == "data":
        assert parts <= DATA_MAY_IMPORT
        return
    if own == "":
        assert not found
        return
    height = next(i for i, layer in enumerate(LAYERS) if own in layer)
    below = set().union(*LAYERS[:height])
    allowed = below | ({"data"} if own in MAY_IMPORT_DATA else set())
    assert parts <= allowed, f"{module} imports {sorted(parts - allowed)}"


@pytest.mark.parametrize("module", MODULES)
def test_lightning_and_deepspeed_stay_in_training(module):
    roots = {name.split(".")[0] for name in imported_by(MODULES[module])}
    if part(module) != "training":
        assert not roots & {"lightning", "pytorch_lightning"}
    if module != "rwkv_miss.training.zero":
        assert "deepspeed" not in roots


MAY_READ_THE_ENVIRONMENT = (
    *("rwkv_miss.files", "rwkv_miss.ops.cpu.build", "rwkv_miss.__main__", "rwkv_miss.benchmarks.generate"),
    "rwkv_miss.data.workers",
)


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "training" and m not in MAY_READ_THE_ENVIRONMENT])
def test_the_environment_decides_nothing(module):
    """Except the launcher's variables in training, the paths of the compiler and its cache, how libgomp waits, and what
    another program is told by it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in ("environ", "getenv", "environb"), f"line {node.lineno}"


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("rwkv-miss") == rwkv_miss.__version__


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_threads_share_the_cores_unless_the_user_has_said_how_they_wait(monkeypatch, given, spin_count):
    from rwkv_miss import __main__

    monkeypatch.setattr(os, "environ", dict(given))
    __main__._share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == spin_count
