"""Files that a run leaves: written whole, or line by line."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


def write_whole(file: Path, text: str) -> None:
    """Write a file that nobody ever finds half written, should the process be killed."""
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def write_json(file: Path, value: Any) -> None:
    """Write a value, or every field of a dataclass, as JSON."""
    write_whole(file, json.dumps(value, indent=2, default=dataclasses.asdict) + "\n")


def read_json(file: Path) -> Any:
    """Read a file of JSON."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_lines(file: Path, rows: list[Any]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_line(file: Path, line: str) -> None:
    """Add a line to a file of text."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(line + "\n")


def cache_folder() -> Path:
    """What runs share: $LORAPRE_CACHE, or lorapre under $XDG_CACHE_HOME or ~/.cache."""
    if override := os.environ.get("LORAPRE_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorapre"
