"""The layers of the library, read from its source: who may import whom, and how long files are."""

import ast
import functools
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lorapre

SRC = Path(__file__).parents[1] / "src"
LIBRARY = SRC / "lorapre"
MODULES = {
    ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in LIBRARY.rglob("*.py")
}

# From the ground up. A module may import from the floors below its own only. A module that is not
# listed here fails the test.
FLOORS: list[set[str]] = [
    {"backends.library", "groups", "linalg", "rounding", "sharding"},
    {"gradient"},
    {"backends", "variants"},
    {"batch", "checkpoints", "options", "report"},
    {"optimizers"},
    {"integrations", "migration", "release"},
]
# Files that are one unit with another: they are loaded when a DTensor or a kernel is wanted.
UNITS = {"backends.c": "backends", "backends.triton": "backends"}

# Package -> the only module of lorapre that may import it.
ONLY_IN = {"torch.distributed": "sharding", "triton": "backends.triton"}


def imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, inside functions and behind TYPE_CHECKING too."""
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


def unit(module: str) -> str:
    """What the table of floors calls a module."""
    return "integrations" if within(module, "integrations") else UNITS.get(module, module)


def home(name: str) -> str:
    """The module that an imported name comes from; of a public name, the one that defines it."""
    path = name.split(".")[1:]
    while ".".join(path) not in MODULES and len(path) > 1:
        path.pop()
    module = ".".join(path)
    if module not in MODULES and hasattr(lorapre, module):
        module = getattr(lorapre, module).__module__.removeprefix("lorapre.")
    return module


def below(of: str) -> set[str]:
    """The units of which a unit imports modules."""
    names = {name for module, path in MODULES.items() if unit(module) == of for name in imports(path)}
    return {unit(home(name)) for name in names if within(name, "lorapre") and name != "lorapre"} - {of}


UNITS_HERE = sorted({unit(module) for module in MODULES} - {"__init__"})


@pytest.mark.parametrize("name", UNITS_HERE)
def test_imports_point_down(name: str) -> None:
    floor = next((i for i, floor in enumerate(FLOORS) if name in floor), None)
    assert floor is not None, f"{name} has no floor"
    assert below(name) <= set().union(*FLOORS[:floor])


def test_the_house_has_six_floors_at_most() -> None:
    @functools.cache
    def height(name: str) -> int:
        return 1 + max(map(height, below(name)), default=0)

    assert max(map(height, UNITS_HERE)) <= 6
    assert set().union(*FLOORS) == set(UNITS_HERE)  # the table lists no module that is gone


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_that_are_slow_or_optional_have_one_home_each(module: str) -> None:
    names = imports(MODULES[module])
    assert not any(within(name, "lorapre_recipes") for name in names)
    for package, only in ONLY_IN.items():
        assert module == only or not any(within(name, package) for name in names), f"{package} is for {only}"
    if not within(module, "integrations"):  # loaded on demand, for the package that it integrates
        packages = {name.split(".")[0] for name in names}
        assert packages <= {"lorapre", "torch", *ONLY_IN, *sys.stdlib_module_names}


# --- sizes


def code() -> list[Path]:
    return sorted(path for path in LIBRARY.rglob("*") if path.suffix in (".py", ".c"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("path", code(), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_a_file_can_be_read(path: Path) -> None:
    assert max(map(len, lines(path)), default=0) <= 100
    assert len(lines(path)) <= (450 if path.suffix == ".c" else 400)


def test_the_library_is_small() -> None:
    assert sum(len(lines(path)) for path in code()) <= 4873  # the aim is 3,600: it must not grow


# --- what an import does


def fresh(script: str) -> str:
    """What a script prints in a new process, on both streams."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.stdout


def test_import_of_the_library_needs_torch_only() -> None:
    printed = fresh(
        "import sys, torch; before = set(sys.modules); import lorapre; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    assert set(printed.split()) <= {"lorapre", "torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("numpy", ["there", "missing"])
def test_import_of_the_library_says_nothing_and_loads_nothing_slow(numpy: str) -> None:
    """Without numpy torch warns at its first use, which must not be in lorapre."""
    hide = "sys.modules['numpy'] = None; " if numpy == "missing" else ""
    printed = fresh(
        f"import sys, warnings; {hide}warnings.simplefilter('ignore'); import torch; "
        "warnings.simplefilter('error'); import lorapre; "
        "slow = ('torch.distributed.tensor', 'triton', 'torch._inductor', 'torch._dynamo'); "
        "print(*(x for x in slow if x in sys.modules))"
    )
    assert printed.split() == []


# --- documentation


def test_every_public_name_is_documented() -> None:
    assert lorapre.__all__
    for name in lorapre.__all__:
        thing = getattr(lorapre, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            # vars(), because getattr() would find the docstring of a base class
            assert vars(thing).get("__doc__") or thing.__doc__, name
        for method, member in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(member) and not method.startswith("_"):
                assert member.__doc__, f"{name}.{method}"
