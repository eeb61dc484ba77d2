"""Who may import whom (the README's architecture section), read from the source without running it.

A late import inside a function counts as much as one at the top; so does one for type checking.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The table. A new file of mupjax goes into one of these two lists, under its name without `.py`; a
# folder is one entry. The engine is in order: a file may import only the ones before it.
ENGINE = [
    "cores",
    "turns",
    "lapack",
    "setting",
    "data",
    "config",
    "roles",
    "parametrization",
    "adapters",
    "family",
    "models",
    "depth",
    "resolve",
    "program",
    "uses",
    "optimizers",
    "matrix_optimizers",
    "observe",
    "plan",
    "results",
    "train",
    "prepare",
    "groups",
    "fastest",
    "execute",
    "sweep",
    "coord_check",
    "depth_check",
]
TOP = [
    "verdict",
    "figures",
    "report",
    "table",
    "diagnose",
    "mechanism",
    "reproduce",
    "quickstart",
    "config_file",
    "commands",
    "cli",
    "__main__",
]

# What else of the house a package may import, by module.
JOINTS = {
    # A closed form may come as a model of pure functions: the type is in mupjax.adapters.
    "synthetic": ["mupjax.setting", "mupjax.models", "mupjax.adapters"],
    "theory": ["mupjax.results", "mupjax.observe", "mupjax.lapack", "mupjax.turns"],
}

# What the engine, `synthetic` and `theory` may import from outside, besides the standard library.
NUMERICS = ["jax", "flax", "optax", "numpy", "scipy", "xarray"]
OUTSIDE = {
    "mupjax": [*NUMERICS, "tqdm"],
    "synthetic": NUMERICS,
    "theory": NUMERICS,
}
# Exceptions, by entry of the engine.
OUTSIDE_EXTRA = {
    # the handwritten digits; byte pairs; local copies of text in Parquet
    "data": ["sklearn", "sentencepiece", "pyarrow"],
    "execute": ["threadpoolctl"],  # keeps the threads of LAPACK and XLA apart
}

PACKAGES = ["mupjax", "synthetic", "theory"]


def violations(root: Path) -> list[str]:
    """Every import under `root` that the table forbids, as 'file:line: what and why'."""
    modules = {module: path for name in PACKAGES for module, path in modules_of(root, name)}
    found = []
    for module, path in modules.items():
        where = path.relative_to(root).as_posix()
        reason = misplaced(module)
        if reason is not None:
            found.append(f"{where}: {reason}")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        is_package = path.name == "__init__.py"
        for line, target in imports(tree, module, is_package, modules):
            reason = forbidden(module, target)
            if reason is not None:
                found.append(f"{where}:{line}: {reason}")
    return found


def modules_of(root: Path, package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((root / package).rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), path


def imports(
    tree: ast.AST, module: str, is_package: bool, modules: dict[str, Path]
) -> Iterator[tuple[int, str | None]]:
    """Line and full name of each module imported; None for a name only known at run time."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=source, names=names, level=level):
                if level:
                    parts = module.split(".")
                    parts = parts[: len(parts) - level + is_package]
                    source = ".".join([*parts, source] if source else parts)
                for alias in names:
                    # `from package import x`: a module if there is one of that name.
                    full = f"{source}.{alias.name}"
                    yield node.lineno, full if full in modules else source
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
                if name in ("import_module", "__import__"):
                    match arguments:
                        case [ast.Constant(value=str(target)), *_]:
                            yield node.lineno, target
                        case _:
                            yield node.lineno, None


def unit(module: str) -> str:
    """The entry of the table for a module of mupjax: `figures` for `mupjax.figures.style`."""
    return module.split(".")[1] if "." in module else "__init__"


def misplaced(module: str) -> str | None:
    if module.split(".")[0] != "mupjax" or unit(module) in [*ENGINE, *TOP, "__init__"]:
        return None
    return (
        f"{module} is in neither list of the import table: add {unit(module)!r} to ENGINE, after "
        "all that it imports and before all that import it, or to TOP (tests/test_imports.py)"
    )


def forbidden(module: str, target: str | None) -> str | None:
    """Why `module` may not import `target`, or None where it may."""
    package = module.split(".")[0]
    if package == "mupjax" and unit(module) in TOP:
        return None
    if target is None:
        return f"{module} imports a name that is only known at run time: no one can check it"
    origin = target.split(".")[0]
    if origin not in PACKAGES:
        allowed = OUTSIDE[package]
        if package == "mupjax":
            allowed = allowed + OUTSIDE_EXTRA.get(unit(module), [])
        if origin in allowed or origin in sys.stdlib_module_names:
            return None
        return f"{module} imports {target}; from outside it may import {', '.join(allowed)}"
    if package == "mupjax":
        return forbidden_in_engine(module, target)
    if origin == package or any(
        target == joint or target.startswith(f"{joint}.") for joint in JOINTS[package]
    ):
        return None
    return (
        f"{module} imports {target}; of the house {package} may import {', '.join(JOINTS[package])}"
    )


def forbidden_in_engine(module: str, target: str) -> str | None:
    if target.split(".")[0] != "mupjax":
        return f"{module} imports {target}; the engine knows neither synthetic nor theory"
    if unit(module) == unit(target):
        return None
    if unit(target) == "__init__":
        return f"{module} imports from mupjax itself: name the module that has it"
    if unit(target) not in ENGINE:
        return f"{module} imports {target}, which is not of the engine"
    if unit(module) == "__init__":
        return None
    earlier = ENGINE[: ENGINE.index(unit(module))]
    if unit(target) in earlier:
        return None
    return f"{module} imports {target}, which comes after it; before it: {', '.join(earlier)}"


def test_every_import_is_in_the_table() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_modules_is_a_package(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    folders = {path.parent for _, path in modules_of(ROOT, package)}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py, so not installed: {missing}"


# The checker itself, on a small tree that keeps the table and then breaks it in one place.
CLEAN = {
    "mupjax/__init__.py": "from mupjax.setting import Setting\nfrom .train import run",
    "mupjax/setting.py": "import jax.numpy as jnp\nSetting = object",
    "mupjax/data/arrays.py": "def digits():\n    from sklearn.datasets import load_digits",
    "mupjax/models/__init__.py": "from mupjax.models.mlp import MLP",
    "mupjax/models/mlp.py": "from .. import setting\nfrom ..setting import Setting",
    "mupjax/observe.py": "",
    "mupjax/results.py": "import xarray",
    "mupjax/train.py": "from mupjax import models, setting\nimport mupjax.results as results",
    "mupjax/figures/__init__.py": "import matplotlib, theory\nfrom . import style",
    "mupjax/figures/style.py": "import synthetic\nfrom mupjax import Setting",
    "mupjax/cli.py": "import importlib, tyro\nimport mupjax.figures\nimportlib.import_module(name)",
    "mupjax/__main__.py": "from mupjax.cli import main",
    "synthetic/__init__.py": "from synthetic.planted import planted",
    "synthetic/planted.py": "import scipy.linalg\nfrom mupjax.models.mlp import MLP",
    "theory/__init__.py": "",
    "theory/gaps.py": "from mupjax import results\nfrom mupjax.observe import Observer",
}
OTHER_PACKAGES = "knows neither synthetic nor theory"
ONLY_JOINTS = "of the house"
BROKEN = [
    # file, what it says instead, part of the complaint
    ("mupjax/train.py", "import theory.gaps", OTHER_PACKAGES),
    ("mupjax/train.py", "def f():\n    from synthetic import planted", OTHER_PACKAGES),
    ("mupjax/train.py", "import importlib as i\ni.import_module('theory')", OTHER_PACKAGES),
    ("mupjax/train.py", "__import__(name)", "only known at run time"),
    ("mupjax/train.py", "import mupjax.cli", "not of the engine"),
    ("mupjax/train.py", "from mupjax import Setting", "from mupjax itself"),
    ("mupjax/train.py", "if TYPE_CHECKING:\n    import matplotlib.pyplot", "from outside"),
    ("mupjax/train.py", "from sklearn.datasets import load_digits", "from outside"),
    ("mupjax/setting.py", "from .results import Results", "comes after it"),
    ("mupjax/models/mlp.py", "from mupjax import train", "comes after it"),
    ("mupjax/models/mlp.py", "from ..train import run", "comes after it"),
    ("mupjax/__init__.py", "from .figures import style", "not of the engine"),
    ("mupjax/helpers.py", "", "in neither list"),
    ("synthetic/planted.py", "import theory", ONLY_JOINTS),
    ("synthetic/planted.py", "import mupjax.train", ONLY_JOINTS),
    ("synthetic/planted.py", "import mupjax.settings", ONLY_JOINTS),
    ("theory/gaps.py", "from synthetic.planted import planted", ONLY_JOINTS),
    ("theory/gaps.py", "from mupjax import train", ONLY_JOINTS),
    ("theory/gaps.py", "from mupjax import results, cli", ONLY_JOINTS),
    ("theory/gaps.py", "import mupjax", ONLY_JOINTS),
    ("theory/gaps.py", "import sklearn", "from outside"),
]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)


def test_the_checker_accepts_a_clean_tree(tmp_path: Path) -> None:
    write_tree(tmp_path, CLEAN)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("name", "source", "complaint"), BROKEN)
def test_the_checker_finds_a_forbidden_import(
    tmp_path: Path, name: str, source: str, complaint: str
) -> None:
    write_tree(tmp_path, CLEAN | {name: source})
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(name)
    assert complaint in found[0]


# What importing does, in a fresh interpreter.
def run_python(source: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_leaves_the_precision_alone(package: str) -> None:
    assert run_python(f"import jax, {package}; print(jax.config.jax_enable_x64)") == "False"


def test_importing_mupjax_does_not_load_the_heavy_libraries() -> None:
    heavy = ["matplotlib", "sklearn", "scipy.optimize"]
    loaded = run_python(f"import sys, mupjax; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]", f"import mupjax loads {loaded}: import them where they are used"


# A path of one machine, at the start of a word: not the middle of a relative path. The names are
# put together here so that this file does not find itself.
MACHINE_PATH = re.compile(rb"(?<![\w.~*}-])/(?:" + b"|".join([b"work", b"root", b"tmp"]) + rb")/")


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of tracked files")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60, check=True
    ).stdout
    tracked = [ROOT / os.fsdecode(name) for name in listing.split(b"\0") if name]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked
        if path.is_file()
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, f"a path that no other machine has: {found}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("open('/{}/x')", True),
        ("cd /{}/main", True),
        ("docs/{}/x", False),
        ("./{}/x", False),
        ("/{}s/x", False),
    ],
)
@pytest.mark.parametrize("folder", ["work", "root", "tmp"])
def test_the_path_pattern(text: str, found: bool, folder: str) -> None:
    assert bool(MACHINE_PATH.search(text.format(folder).encode())) is found
