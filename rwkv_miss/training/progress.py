"""What a person sees of a run: a progress bar, or lines where the output is no terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Characters of a sample's prompt that are shown: its end.
_SHOWN = 300


def printable(text: str) -> str:
    """The text with U+FFFD for control characters, which a terminal would obey and a page may not hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class TrainingDisplay:
    """Shows how far a run is. A terminal that goes away in the middle ends the display, not the run."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console, self._total_steps = console, total_steps
        self._bar: Progress | None = None

    def start(self, step: int) -> None:
        """Begins at optimizer step `step`."""
        self._first_step, self._start = step, time.monotonic()
        if self._console.is_terminal:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=self._total_steps, completed=step, figures="")
            self._bar.start()

    def step(self, step: int) -> None:
        """An optimizer step is done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows `val_loss`, or else `loss`, `lr`, `tokens_per_s` and `positions_per_s`."""
        if "val_loss" in figures:
            self._print(f"step {step}: validation loss {figures['val_loss']:.4f}")
            return
        speed = f"{figures['tokens_per_s']:,.0f} tokens/s"
        if round(figures["positions_per_s"]) != round(figures["tokens_per_s"]):
            speed += f" ({figures['positions_per_s']:,.0f} with padding)"
        if self._bar:
            self._bar.update(self._task, figures=f"loss {figures['loss']:.4f}  {speed}")
            return
        a_step = (time.monotonic() - self._start) / max(step - self._first_step, 1)
        lr = f"  lr {figures['lr']:.2e}" if "lr" in figures else ""
        left = (self._total_steps - step) * a_step
        self._print(f"step {step}/{self._total_steps}  loss {figures['loss']:.4f}{lr}  {speed}  ETA {left:.0f} s")

    def sample(self, step: int, prompt: str, answer: str, expected: str) -> None:
        """Shows a sample answer, and what the data has in its place."""
        is_right = answer.strip() == expected.strip()
        end = prompt.strip()
        if len(end) > _SHOWN:
            end = "..." + end[-_SHOWN:]
        self._print(printable(f"step {step}, sample: {end}{answer.rstrip()}"))
        self._print("  [right]" if is_right else printable(f"  [expected: {expected.strip()}]"))

    def stop(self) -> None:
        """Ends the display; may be called more than once."""
        if self._bar:
            bar, self._bar = self._bar, None
            self._quietly(bar.stop)

    def _print(self, text: str) -> None:
        self._quietly(lambda: self._console.print(text, highlight=False, soft_wrap=True))

    def _quietly(self, show) -> None:
        try:
            show()
        except OSError:  # the terminal was closed
            self._console.quiet = True
