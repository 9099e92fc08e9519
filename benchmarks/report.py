"""The report of a machine: every result in a folder, as DATE_HARDWARE.md beside it.

    python benchmarks/report.py

Each table comes with the command that made it; nothing in the page is written by hand.
"""

from pathlib import Path
from typing import Any

from common import ROOT, Result, environment, label, shown
from cyclopts import App

ORDER = ("tests", "predicted", "training", "step_time", "memory", "scaling", "bf16", "tracking")

app = App(help=__doc__)


@app.default
def main(*, out: Path | None = None) -> None:
    """Write the report.

    Args:
        out: folder of the results. Default: benchmarks/results/DATE_HARDWARE of today and this machine.
    """
    folder = out or ROOT / "benchmarks" / "results" / label(environment())
    results = [(file, Result.load(file)) for file in sorted(folder.glob("*.json"))]
    results.sort(key=lambda pair: ORDER.index(pair[1].benchmark))
    if not results:
        raise SystemExit(f"report.py: no results in {shown(folder)}")
    page = folder.with_suffix(".md") if out is None else folder / "report.md"
    page.write_text(render(results, page.parent), encoding="utf-8")
    print(f"Written: {shown(page)}")


def render(results: list[tuple[Path, Result]], root: Path) -> str:
    """The page; pictures are linked as seen from `root`."""
    facts = results[0][1].environment
    sections = [f"# Benchmarks, {facts['date']}", machine(facts)]
    for file, result in results:
        sections += [f"## {result.title}, {result.device}", f"```bash\n{result.command}\n```"]
        if result.environment != facts:
            sections.append(machine(result.environment))
        sections.append(result.markdown())
        sections += ["\n".join(f"* {note}" for note in result.below)]
        picture = file.with_suffix(".png")
        if picture.exists():
            sections.append(f"![{result.title}]({picture.relative_to(root).as_posix()})")
    return "\n\n".join(section for section in sections if section) + "\n"


def machine(facts: dict[str, Any]) -> str:
    """Hardware and versions."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads of torch",
        f"GPU: {facts['gpu'] or 'none'}" + (f", driver {facts['driver']}" if facts.get("driver") else ""),
        versions,
        f"commit {facts['commit']}, {facts['date']}",
    ]
    return "\n".join(f"* {line}" for line in lines)


if __name__ == "__main__":
    app()
