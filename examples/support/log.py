"""What a run logs: a CSV file, and TensorBoard where it is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exfusion_param.history import append_row, drop_rows_after


class RunLog:
    """Writes rows to `metrics.csv` in a folder, and beside it for TensorBoard.

    A tracker such as wandb or trackio takes the same dict: `wandb.log(row, step=step)`.

    Args:
        folder: of the files.
        after: the step that the run continues after; rows of later ones are dropped.
    """

    def __init__(self, folder: Path, after: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        if self.path.exists():
            drop_rows_after(self.path, after)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            print("tensorboard is not installed: logging to metrics.csv only.")
        else:
            self.board = SummaryWriter(folder)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        append_row(self.path, {"step": step} | dict(values))
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what TensorBoard has waiting."""
        if self.board is not None:
            self.board.close()
