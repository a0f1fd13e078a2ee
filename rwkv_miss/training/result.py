"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainResult:
    """steps: optimizer steps of the whole run. first_loss, last_loss: of the first and the last step. base_val_loss:
    the base's own validation loss; best_val_loss: the least of those after it, of step best_step; None where nothing
    validates, or not yet."""

    steps: int
    first_loss: float | None
    last_loss: float | None
    base_val_loss: float | None
    best_val_loss: float | None
    best_step: int

    def validation(self) -> str:
        """The result of the validations, as text to append to a sentence; empty if there was none."""
        if self.best_val_loss is None:
            return ""
        base = f"from {self.base_val_loss:.4f} " if self.base_val_loss is not None else ""
        return f"; validation loss {base}to {self.best_val_loss:.4f} (best, step {self.best_step})"

    def warning(self) -> str | None:
        """What the user should know if the loss did not fall; None if it did."""
        if self.base_val_loss is not None and self.best_val_loss is not None:
            if self.best_val_loss > self.base_val_loss:
                return (
                    f"the best validation loss, {self.best_val_loss:.4f}, is above the base's own, "
                    f"{self.base_val_loss:.4f}: the adapter makes the model worse on this data. Lower lr"
                )
        elif self.first_loss is not None and self.last_loss is not None and self.last_loss > self.first_loss:
            return (
                f"the last step's loss, {self.last_loss:.4f}, is above the first step's, {self.first_loss:.4f}. If "
                "that is not chance (a validation, --val_split, would tell), lower lr"
            )
        return None
