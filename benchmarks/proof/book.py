"""The results of a proof: one small file, from which alone its page can be made."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from util.atomic import write_atomically
from util.errors import UsageError

RESULTS = "results.json"
# Results of arms: for each seed what its jobs found, by the name of the job.
Results = dict[str, dict[int, dict[str, dict]]]


class Book:
    """The settings of an experiment and the findings of its jobs, written after every job.

    Args:
        folder: the output folder; its `results.json` is read if it is there.

    Attributes:
        found: results of the jobs.
        settings: of the experiment, see `settings_of`.
        setting: counts of pictures, versions and the like, for the page.
        seconds: that it took so far, by the clock.

    Raises:
        UsageError: the file is none that this class wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS
        self.found: Results = {}
        self.settings: dict[str, object] = {}
        self.setting: dict[str, object] = {}
        self.seconds = 0.0
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text())
                self.settings, self.setting = content["settings"], content["setting"]
                self.seconds = content["seconds"]
                for arm, seeds in content["results"].items():
                    self.found[arm] = {int(seed): jobs for seed, jobs in seeds.items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UsageError(
                    f"{self.path} is no file of results of this program: {error}"
                ) from error
        self._began = time.perf_counter() - self.seconds

    def of(self, arm: str, seed: int) -> Mapping[str, dict]:
        """Results of an arm and seed."""
        return self.found.get(arm, {}).get(seed, {})

    def check(self, settings: Mapping[str, object]) -> None:
        """Compare an experiment's settings with those that are there.

        More arms, seeds and shares of the labels may come, but none with other settings.

        Raises:
            UsageError: these are the results of another experiment.
        """
        for name, value in settings.items() if self.settings else ():
            there = self.settings.get(name)
            if isinstance(value, dict) and isinstance(there, dict):
                value = {key: value[key] for key in value if key in there}
                there = {key: there[key] for key in value}
            if value != there:
                raise UsageError(
                    f"--output_dir {self.path.parent} holds an experiment with other settings "
                    f"({name} {there}, now {value}): give the same, or another folder"
                )

    def begin(self, settings: Mapping[str, object], setting: Mapping[str, object]) -> None:
        """Write down an experiment whose settings were checked."""
        self.settings = _merged(self.settings, settings)
        self.setting = _merged(self.setting, setting)
        self.write()

    def add(self, arm: str, seed: int, job: str, found: Mapping[str, object]) -> None:
        """Note what a job found."""
        self.found.setdefault(arm, {}).setdefault(seed, {})[job] = dict(found)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.seconds = time.perf_counter() - self._began
        content = {
            "settings": self.settings,
            "setting": self.setting,
            "seconds": self.seconds,
            "results": self.found,
        }
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def seconds_of(self, jobs: Iterable[tuple[str, int]]) -> float | None:
        """The time that jobs will take by what those done took; None if none is done yet.

        Args:
            jobs: kind and passes of each; a kind not seen yet takes the mean of all.
        """
        spent: dict[str, list[float]] = {}
        for seeds in self.found.values():
            for entries in seeds.values():
                for name, entry in entries.items():
                    seconds, passes = spent.setdefault(kind_of(name), [0.0, 0.0])
                    spent[kind_of(name)] = [seconds + entry["seconds"], passes + entry["passes"]]
        if not spent:
            return None
        everything = [sum(column) for column in zip(*spent.values(), strict=True)]
        left = 0.0
        for kind, count in jobs:
            seconds, passes = spent.get(kind, everything)
            left += count * seconds / max(passes, 1)
        return left


def kind_of(job: str) -> str:
    """Jobs of a kind take the same time a picture: the name of the job up to "-"."""
    return job.partition("-")[0]


def _merged(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    """New values; what old dictionaries have beside the new ones stays."""
    return {n: old.get(n, {}) | v if isinstance(v, dict) else v for n, v in new.items()}
