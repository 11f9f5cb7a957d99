"""Measuring: interleaved rounds, ratios, and a description of the machine and versions."""

import platform
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median

import torch


def time_rounds(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    seconds_of: Callable[[Callable[[], object]], float],
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Time every form once a round, each round starting with another, after warming up.

    Args:
        runs: name of a form to what is timed.
        rounds: how often.
        seconds_of: calls what it is given and says how long that took.
        warmup: calls of each form before.

    Returns:
        The seconds of each form, one entry a round.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    forms, seconds = list(runs), {form: [] for form in runs}
    for number in range(rounds):
        first = number % len(forms)
        for form in forms[first:] + forms[:first]:
            seconds[form].append(seconds_of(runs[form]))
    return seconds


def wall_clock(device: str) -> Callable[[Callable[[], object]], float]:
    """A measure for `time_rounds`: seconds of a call, with all that it starts on the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds_of(run: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return seconds_of


def processor_time(run: Callable[[], object]) -> float:
    """A measure for `time_rounds`: processor time of a call, which other work changes least."""
    start = time.process_time()
    run()
    return time.process_time() - start


def step_time(device: str) -> Callable[[Callable[[], object]], float]:
    """A measure for `time_rounds`: `processor_time` on a CPU with one thread, else `wall_clock`."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    return processor_time if alone else wall_clock(device)


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """`a / b` within each round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def median_and_range(values: Sequence[float]) -> str:
    """Median (minimum–maximum)."""
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def environment(program: str, argv: Sequence[str], device: str = "cpu") -> dict[str, str]:
    """Hardware, versions and command, without which a number means nothing.

    Args:
        program: name of the benchmark's module.
        argv: its arguments.
        device: cpu or cuda.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    cpu = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{program}", *argv]),
    }


def print_environment(surroundings: dict[str, str]) -> None:
    """The head of a report."""
    print("\n".join(f"{name}: {value}" for name, value in surroundings.items()), flush=True)
