"""Build sdist and wheel, and try the wheel where there is nothing but torch: no compiler, no recipes.

The wheel is built from the sdist, which shows that nothing is missing in it. Both stay in dist/.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
USE = """
import importlib.resources, pathlib, sys, warnings
import torch, lorapre

assert pathlib.Path(lorapre.__file__).is_relative_to(sys.prefix), lorapre.__file__
assert "int" in importlib.resources.files("lorapre.backends").joinpath("kernels.c").read_text()
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
before = [p.clone() for p in model.parameters()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = lorapre.LoRAPreAdamW(lorapre.param_groups(model, rank=4), lr=0.1)
    for _ in range(2):
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
words = [str(x.message) for x in caught if "compiled kernels" in str(x.message)]
assert len(words) == 1, [str(x.message) for x in caught]
assert "/nonexistent" in words[0], words
assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))
print("The wheel steps, and warned once:", words[0])
"""


def main() -> None:
    """Build, check, try."""
    shutil.rmtree(DIST, ignore_errors=True)
    python("-m", "build", "--no-isolation", str(ROOT))
    sdist, wheel = sorted(DIST.iterdir(), key=lambda file: file.suffix)
    python("-m", "twine", "check", "--strict", str(sdist), str(wheel))
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "venv", "--without-pip", folder)
        (packages,) = Path(folder).glob("lib/python*/site-packages")
        for name in with_dependencies("torch"):
            for top in {file.parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
                (packages / top).symlink_to(metadata.distribution(name).locate_file(top))
        python("-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
        # No PYTHONPATH, so that Python finds nothing but what is installed there.
        variables = {"CC": "/nonexistent", "LORAPRE_CACHE": f"{folder}/cache", "PATH": os.environ["PATH"]}
        inside: dict[str, Any] = {"cwd": folder, "env": variables}
        quiet = "-Wignore:Failed to initialize NumPy"  # torch does without, too
        subprocess.run([f"{folder}/bin/python", quiet, "-c", USE], check=True, **inside)
        bare = subprocess.run([f"{folder}/bin/lorapre"], capture_output=True, text=True, **inside)
        assert bare.returncode == 1, bare
        assert bare.stderr.endswith("pip install 'lorapre[recipes]'\n"), bare.stderr
        print("Without the recipes:", bare.stderr.strip())


def python(*arguments: str) -> None:
    """Run the Python of this environment."""
    subprocess.run([sys.executable, *arguments], check=True)


def with_dependencies(name: str) -> set[str]:
    """A distribution that is installed, and all that it needs here."""
    found, todo = set[str](), [name]
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            found.add(name)
            wanted = map(Requirement, metadata.requires(name) or ())
            todo += [x.name for x in wanted if x.marker is None or x.marker.evaluate({"extra": ""})]
    return found


if __name__ == "__main__":
    main()
