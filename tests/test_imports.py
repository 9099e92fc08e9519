"""The layers of the library, read from the source: who may import whom."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorapre

SRC = Path(__file__).parents[1] / "src"

# Module of lorapre -> the modules of lorapre it may import. A module that is not listed here fails the test.
LAYERS: dict[str, set[str]] = {
    "operands": set(),
    "cpu_kernels": {"operands"},
    "linalg": {"cpu_kernels"},
    "factors": {"cpu_kernels", "linalg"},
    "rules": set(),
    "groups": set(),
    "report": {"groups", "sharding"},
    "rounding": set(),
    "sharding": {"linalg"},
    "kernels": {"operands"},
    "batch": {"groups", "rounding", "sharding"},
    "tracking": {"batch", "cpu_kernels", "factors", "linalg"},
    "moments": {"batch", "factors", "linalg", "rules", "tracking"},
    "launch": {"batch", "cpu_kernels", "kernels", "linalg", "moments", "operands", "rules", "tracking"},
    "steps": {"batch", "factors", "launch", "linalg", "moments", "rules", "tracking"},
    "optimizers": {"batch", "factors", "groups", "linalg", "rules", "sharding", "steps"},
    "release": {"optimizers", "sharding"},
    "__init__": {"optimizers", "groups", "report", "release"},
}

# Package -> the only module of lorapre that may import it.
ONLY_IN = {"torch.distributed": "sharding", "triton": "kernels"}


LIBRARY = SRC / "lorapre"
MODULES = {".".join(path.relative_to(LIBRARY).with_suffix("").parts): path for path in LIBRARY.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports anywhere, inside functions and behind TYPE_CHECKING too."""
    parents = path.relative_to(SRC).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_import_direction(module: str) -> None:
    names = imports(MODULES[module])
    assert not any(within(name, "lorapre_recipes") for name in names)
    for package, home in ONLY_IN.items():
        assert module == home or not any(within(name, package) for name in names), (
            f"{package} is for {home}.py"
        )
    if module.startswith("integrations"):
        return  # loaded on demand, free to import the package it integrates and anything of lorapre
    assert {name.split(".")[0] for name in names} <= {"lorapre", "torch", *ONLY_IN, *sys.stdlib_module_names}
    inside = {name.split(".")[1] for name in names if within(name, "lorapre")}
    assert inside <= LAYERS[module]


def test_the_table_of_layers_has_no_cycles() -> None:
    done: set[str] = set()
    while ready := {module for module in LAYERS if module not in done and LAYERS[module] <= done}:
        done |= ready
    assert done == set(LAYERS)


def test_import_of_the_library_needs_torch_only() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import lorapre; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    torchs_own = {"torch", "sympy", "mpmath"}  # torch.distributed.tensor needs them
    assert set(result.stdout.split()) <= {"lorapre", *torchs_own, *sys.stdlib_module_names}


def test_every_public_name_is_documented() -> None:
    assert lorapre.__all__
    for name in lorapre.__all__:
        thing = getattr(lorapre, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            # vars(), not getattr(): a class inherits its base's docstring
            assert vars(thing).get("__doc__") or thing.__doc__, name
        for method, member in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(member) and not method.startswith("_"):
                assert member.__doc__, f"{name}.{method}"
