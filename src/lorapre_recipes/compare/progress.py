"""What a comparison says while it runs: a plan, a line for each cell, and progress.log."""

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

    All cells take about as long as one with `config`; `jobs` of them run at a time.
    """

    def __init__(self, out: Path, config: PretrainConfig, jobs: int) -> None:
        self.out, self.steps, self.jobs = out, config.steps, jobs
        self.tokens = config.steps * config.tokens_per_step
        self.planned, self.ended, self.running = 0, 0, dict[Path, float]()
        # The plan says how long it takes if an earlier comparison like this one took its time.
        words = (config.preset, config.precision, config.compile, config.sequence_length, jobs)
        self.kind = " ".join(map(str, words))
        self.times = cache_folder() / "times.json"
        self.seconds: float | None = self.known_times().get(self.kind)  # for a token
        self._stop = threading.Event()
        self._log = threading.Thread(target=self._write, daemon=True)

    def known_times(self) -> dict[str, float]:
        """Seconds for a token in comparisons of each kind."""
        return dict(read_json(self.times)) if self.times.is_file() else {}

    def start(self, comparison: Comparison) -> None:
        """Print the plan, and begin with progress.log."""
        more = comparison.extend or comparison.seeds > 1
        later = "more for edges and seeds" if more else "no more"
        runs = f"{self.planned} runs of {short(self.tokens)} tokens, {self.jobs} at a time"
        print(f"{runs}; {later}", flush=True)
        print(f"time: {self.left()}; {self.out / 'progress.log'} has a line a minute", flush=True)
        self._log.start()

    def begin(self, cell: Path) -> None:
        """A cell starts."""
        self.running[cell] = time.monotonic()

    def end(self, cell: Path, words: str, *, finished: bool) -> None:
        """Print a line for a cell; `finished` tells whether it ran from its start to its end."""
        seconds = time.monotonic() - self.running.pop(cell)
        self.ended += 1
        if finished:
            self.seconds = seconds / self.tokens
            self.times.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.times, self.known_times() | {self.kind: self.seconds})
        if self.ended < self.planned:
            words += f"; {self.left()} left"
        print(f"{self.ended}/{self.planned}  {cell}  {words}", flush=True)

    def stop(self) -> None:
        """The comparison has ended."""
        self._stop.set()

    def left(self) -> str:
        """How long the cells that are planned by now will take, in words."""
        if self.seconds is None:
            return "not known before a run has ended"
        whole = self.seconds * self.tokens
        begun = sum(min(whole, time.monotonic() - start) for start in list(self.running.values()))
        return f"about {duration((whole * (self.planned - self.ended) - begun) / self.jobs)}"

    def _write(self) -> None:
        while not self._stop.wait(MINUTE):
            done = f"{self.ended}/{self.planned} runs, {self.left()} left"
            cells = [f"{x} {last_step(self.out / x)}/{self.steps}" for x in list(self.running)]
            line = f"{time.strftime('%Y-%m-%d %H:%M')}  {done};  {',  '.join(cells)}"
            append_line(self.out / "progress.log", line)


def last_step(run: Path) -> int:
    """The last step that a run logged."""
    rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    return int(rows[-1]["step"]) if rows else 0
