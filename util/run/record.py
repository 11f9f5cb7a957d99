"""The record of a run: args.json in its output folder, to read and to run again with `--config`."""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from util.atomic import write_atomically
from util.errors import UsageError, printable
from util.run.distributed import is_main_process

RECORD = "args.json"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def write_record(folder: Path, args: Mapping[str, object]) -> None:
    """Write arguments with command, versions and commit.

    Args:
        folder: `--output_dir`.
        args: the arguments as plain values, before the machine's part is filled in.
    """
    if not is_main_process():
        return
    record = {
        "args": dict(args),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }
    text = json.dumps(record, indent=2) + "\n"
    data = text.encode(errors="surrogateescape")
    write_atomically(folder / RECORD, lambda file: file.write(data))


def read_config(path: Path) -> dict[str, object]:
    """The arguments that a file holds: args.json, or names and values as JSON or YAML.

    Raises:
        UsageError: no such file, or something else in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = printable(" ".join(str(error).split()), 150)
        raise UsageError(f"{path} is neither JSON nor YAML: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("args"), dict):
        content = content["args"]
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold names of flags and their values, such as epochs: 100")
    return {str(name): value for name, value in content.items()}


def as_flags(content: Mapping[str, object], actions: Mapping[str, argparse.Action]) -> list[str]:
    """The words of a command line that say the same; None stands for a flag not given.

    Args:
        content: values by the names of arguments.
        actions: those of a parser, by flag.

    Returns:
        Words that the parser judges as it judges those that are typed, unknown names among them.
    """
    words = []
    for name, value in content.items():
        action = actions.get(f"--{name}")
        if action and value is None:
            continue
        if action and action.nargs == 0 and isinstance(value, bool):
            switches = [f for f, a in actions.items() if a.dest == action.dest and a.const is value]
            if switches or value is not action.default:
                words.append(switches[0] if switches else f"--{name}={value}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of this code, with "+" if it was changed since; None outside of a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed in an environment that lies in another project's checkout
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None
