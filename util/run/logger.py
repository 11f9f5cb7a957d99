"""Meters and the console: means over steps, progress, and numbers for reading."""

import resource
import shutil
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from util.run.distributed import all_reduce_sum, is_main_process, world_size


class Meters:
    """Means over steps and processes, summed on the device so that nothing waits for it.

    Two spans at once: since the last `read` (for the console and the curves) and since the epoch
    began (for log.txt). A step that was skipped does not count.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        # One row a meter and a last one that counts steps.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.epoch = torch.zeros(len(names) + 1, dtype=dtype, device=device)
        self.window = torch.zeros_like(self.epoch)

    def update(self, taken: Tensor, **values: Tensor) -> None:
        """Add a step's values, scalars on the device; `taken` is 0 for a skipped step, else 1."""
        row = torch.stack([values[name] for name in self.names] + [taken]).to(self.epoch)
        row = torch.where(taken > 0, row, 0.0)
        self.window += row
        self.epoch += row

    def read(self) -> dict[str, float]:
        """Means since the last call, over all processes; NaN where every step was skipped."""
        means = self._means(self.window)
        self.window.zero_()
        return means

    def read_epoch(self) -> dict[str, float]:
        """Means since the epoch began, over all processes."""
        return self._means(self.epoch)

    def start_epoch(self) -> None:
        """Forget all."""
        self.epoch.zero_()
        self.window.zero_()

    def _means(self, sums: Tensor) -> dict[str, float]:
        *totals, count = all_reduce_sum(sums.clone()).tolist()
        values = (total / count if count else float("nan") for total in totals)
        return dict(zip(self.names, values, strict=True))

    def state_dict(self) -> dict:
        """The epoch's sums, the mean over all processes (a collective)."""
        return {"epoch": (all_reduce_sum(self.epoch.clone()) / world_size()).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned: the main process holds what all had."""
        self.window.zero_()
        self.epoch.zero_()
        if is_main_process():
            self.epoch += self.epoch.new_tensor(state["epoch"]) * world_size()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: allocated on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def count_parameters(model: nn.Module) -> str:
    """Number of a model's parameters, in millions, as text."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as an aligned Markdown table, the first row being its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = rows
    lines = [head, ["-" * width for width in widths], *body]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


# What the bar shows of a step's numbers; all of them would not fit.
_ON_THE_BAR = ("lr", "loss", "images_per_s", "left")
_BAR_COLUMNS = 100


class Progress:
    """One epoch's progress: a bar on a terminal that leaves a line, plain lines elsewhere.

    Args:
        title: what stands before it, such as "Epoch 3/60".
        steps: optimizer steps of the epoch.
        start: steps already done.
        remaining: steps of the whole run after this epoch, for the time left.
    """

    def __init__(self, title: str, steps: int, start: int, remaining: int) -> None:
        self.title, self.steps, self.start, self.remaining = title, steps, start, remaining
        self.begin = time.perf_counter()
        self.bar = None
        if is_main_process() and sys.stderr.isatty():
            layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
            self.bar = tqdm(
                total=steps, initial=start, desc=title, bar_format=layout, leave=False,
                ncols=min(_BAR_COLUMNS, shutil.get_terminal_size().columns),
            )  # fmt: skip

    def advance(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, values: dict[str, float | str]) -> None:
        """Show the numbers after `step` steps of the epoch."""
        done = step - self.start
        left = (time.perf_counter() - self.begin) / done * (self.steps - step + self.remaining)
        values = values | {"left": clock(left)}
        if self.bar is not None:
            shown = {name: values[name] for name in _ON_THE_BAR if name in values}
            self.bar.set_postfix_str(_as_text(shown))
        elif is_main_process():
            width = len(str(self.steps))
            print(f"{self.title}  [{step:{width}d}/{self.steps}]  {_as_text(values)}", flush=True)

    def seconds(self) -> float:
        """Seconds since the epoch began or was resumed."""
        return time.perf_counter() - self.begin

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def finish(self, values: dict[str, float | str]) -> None:
        """Leave a line in the place of the bar; elsewhere the last step's line stands already."""
        self.close()
        if self.bar is not None:
            print(f"{self.title}  {_as_text(values)}", flush=True)


def _as_text(values: dict[str, float | str]) -> str:
    """Names and values, such as "lr 0.001  left 0:00:10"."""
    return "  ".join(
        f"{name} {value if isinstance(value, str) else format(value, '.4g')}"
        for name, value in values.items()
    )
