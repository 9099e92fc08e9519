"""What a comparison says while it runs: its plan, a line for each cell, and progress.log, a line a minute."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from lorapre_recipes.compare.cells import Comparison
from lorapre_recipes.config import PretrainConfig
from lorapre_recipes.console import duration, short
from lorapre_recipes.files import append_line, cache_folder, read_json, write_json
from lorapre_recipes.train.summary import read_metrics

MINUTE = 60.0


class Progress:
    """Counts cells and knows how long they take; used by several threads.

    `config` is that of one cell, all take about as long; `jobs` run at a time, each on `threads`.
    """

    def __init__(self, out: Path, config: PretrainConfig, jobs: int, threads: int) -> None:
        self.out, self.steps, self.jobs = out, config.steps, jobs
        self.tokens = config.steps * config.tokens_per_step
        self.planned, self.ended, self.running = 0, 0, dict[Path, float]()
        # Seconds a token of earlier comparisons like this one, so that the plan can say how long it takes.
        kind = (
            config.preset,
            config.precision,
            config.compile,
            config.batch_size,
            config.sequence_length,
        )
        self.kind = " ".join(map(str, (*kind, jobs, threads)))
        self.times = cache_folder() / "times.json"
        self.seconds = (read_json(self.times) if self.times.is_file() else {}).get(self.kind)
        self._stop = threading.Event()
        self._log = threading.Thread(target=self._write, daemon=True)

    def start(self, comparison: Comparison) -> None:
        """Print the plan, and begin with progress.log."""
        later = (
            "more for edges and seeds" if comparison.extend or comparison.seeds > 1 else "no more"
        )
        print(
            f"{self.planned} runs of {short(self.tokens)} tokens, {self.jobs} at a time; {later}",
            flush=True,
        )
        print(f"time: {self.left()}; {self.out / 'progress.log'} has a line a minute", flush=True)
        self._log.start()

    def begin(self, cell: Path) -> None:
        """A cell starts."""
        self.running[cell] = time.monotonic()

    def end(self, cell: Path, words: str, *, finished: bool) -> None:
        """A cell has ended: print a line. `finished` is whether it ran from its start to its end."""
        seconds = time.monotonic() - self.running.pop(cell)
        self.ended += 1
        if finished:
            self.seconds = seconds / self.tokens
            known = read_json(self.times) if self.times.is_file() else {}
            self.times.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.times, known | {self.kind: self.seconds})
        print(f"{self.ended}/{self.planned}  {cell}  {words}", flush=True)

    def stop(self) -> None:
        """The comparison has ended."""
        self._stop.set()

    def left(self) -> str:
        """How long the cells that are planned by now will take, in words."""
        if self.seconds is None:
            return "known when the first run has ended"
        whole = self.seconds * self.tokens
        begun = sum(min(whole, time.monotonic() - start) for start in list(self.running.values()))
        return f"about {duration((whole * (self.planned - self.ended) - begun) / self.jobs)}"

    def _write(self) -> None:
        while not self._stop.wait(MINUTE):
            lines = [
                f"{cell} {last_step(self.out / cell)}/{self.steps}" for cell in list(self.running)
            ]
            now = time.strftime("%Y-%m-%d %H:%M")
            words = (
                f"{now}  {self.ended}/{self.planned} runs, {self.left()} left;  {',  '.join(lines)}"
            )
            append_line(self.out / "progress.log", words)


def last_step(run: Path) -> int:
    """The last step that a run logged."""
    file = run / "metrics.jsonl"
    rows = read_metrics(file) if file.is_file() else []
    return int(rows[-1]["step"]) if rows else 0
