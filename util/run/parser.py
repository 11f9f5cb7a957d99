"""A command line's parser: errors of one line, defaults in its help, types of its values."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from util.errors import UsageError
from util.run.distributed import complain, print_once
from util.run.record import as_flags, read_config

# Bytes of a file's name, on every file system that is in use.
_LONGEST_NAME = 255


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text that does not state one itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """A list is shown as one types it, of a switch and its opposite the one that is on."""
        if action.default is None or "(default" in action.help or "the default" in action.help:
            return action.help
        if isinstance(action.default, bool):
            return action.help + (" (default)" if action.const is action.default else "")
        if action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: {show_value(action.default).replace('%', '%%')})"


class RecipeValue(float):
    """A default that may give way to what else was asked for; a value that was given is none."""

    def __str__(self) -> str:
        return f"{self:g}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults and whose errors are one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **kwargs)
        self.notes: dict[str, list[str]] = {}
        # argparse's own takes -3.4e+38 for a flag before Python 3.14.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.I)

    def note(self, flag: str, what: str) -> None:
        """Have a line printed after parsing; flags of which the same is to say share it."""
        flags = self.notes.setdefault(what, [])
        if flag not in flags:
            flags.append(flag)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, what `--config` says standing first; then the notes are printed."""
        self.notes.clear()
        words = list(sys.argv[1:] if args is None else args)
        if "--config" in self._option_string_actions:
            words = [*self._configured(words), *words]
        parsed = super().parse_known_args(words, namespace)
        for what, flags in self.notes.items():
            print_once(f"note: {', '.join(flags)}: {what}")
        return parsed

    def _configured(self, words: Sequence[str]) -> list[str]:
        """The flags that the files of `--config` stand for, in order."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config", action="append", type=Path, default=[])
        try:
            files = finder.parse_known_args(words)[0].config
            contents = map(read_config, files)
            return [w for c in contents for w in as_flags(c, self._option_string_actions)]
        except UsageError as error:
            self.error(f"--config: {error}")
        except argparse.ArgumentError:  # said when all is parsed
            return []

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2; an unknown flag gets the nearest known one."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.partition(" ")[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7)
            message = f"unknown argument {flag}" + (f": did you mean {near[0]}?" if near else "")
        complain(f"{self.prog}: error: {message} (--help lists all)")
        self.exit(2)


class Ignored(argparse.Action):
    """A flag that is accepted and changes nothing: no attribute of the arguments.

    Args:
        option_strings: see argparse.
        dest: not used.
        nargs: see argparse.
        note: the reason, printed when the flag is given; nothing is printed without one.
        help: for a flag that has done its part already.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        nargs: int | str | None = None,
        note: str | None = None,
        help: str = argparse.SUPPRESS,
        metavar: str | None = None,
    ) -> None:
        nothing = argparse.SUPPRESS
        super().__init__(
            option_strings, nothing, nargs=nargs, default=nothing, help=help, metavar=metavar
        )
        self.reason = note

    def __call__(
        self, parser: Parser, namespace: argparse.Namespace, values: object, option_string: str
    ) -> None:
        """Note the reason."""
        if self.reason:
            parser.note(option_string, self.reason)


class PathOrDefault(argparse.Action):
    """Stores a path; an empty one, as scripts for MAE give, is the default, which a line says.

    With a text as default the value stays a text.
    """

    def __call__(
        self, parser: Parser, namespace: argparse.Namespace, values: str, option_string: str
    ) -> None:
        """Store the value."""
        value = values if isinstance(self.default, str) else Path(values)
        if not values:
            value = self.default
            meant = "not given" if value is None else f"its default, {value}"
            parser.note(option_string, f"empty, taken as {meant}")
        elif any(len(os.fsencode(part)) > _LONGEST_NAME for part in values.split(os.sep)):
            parser.error(f"argument {option_string}: no file has a name as long as in this path")
        setattr(namespace, self.dest, value)


def complete_resume(argv: Sequence[str] | None) -> list[str]:
    """A command line in which `--resume` has a value: without one it is `--resume auto`.

    So Detectron2 and MMSegmentation have it. A value is auto, none or a checkpoint's file.

    Args:
        argv: the command line; None for the process's own.
    """
    given = [*(sys.argv[1:] if argv is None else argv)]
    for i, (flag, value) in enumerate(zip(given, [*given[1:], ""], strict=True)):
        is_value = value in ("auto", "none") or Path(value).suffix in (".pth", ".pt")
        if flag == "--resume" and not is_value:
            given[i] = "--resume=auto"
    return given


def device_name(text: str) -> str:
    """auto, cuda, cuda:N, mps or cpu."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device: auto, cuda, cuda:N for one GPU, mps or cpu"
        )
    return text


def positive_int(text: str) -> int:
    """1, 2, 3, …"""
    value = _number(int, text, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def odd_int(text: str) -> int:
    """1, 3, 5, …"""
    value = positive_int(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} must be odd, such as {value + 1}")
    return value


def non_negative_int(text: str) -> int:
    """0, 1, 2, …"""
    value = _number(int, text, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def seed(text: str) -> int:
    """0 … 2**32 - 1."""
    value = non_negative_int(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} must be below 2**32")
    return value


def non_negative_float(text: str) -> float:
    """A finite number from 0."""
    value = _number(float, text, "a number")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number, not negative")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def finite_float(text: str) -> float:
    """A number, not infinite."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = non_negative_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def mask_ratio(text: str) -> float:
    """A number between 0 and 1, neither of them."""
    value = share(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(
            f"{text} must lie above 0 and below 1: some patches must stay and some must go"
        )
    return value


def _number(kind: type, text: str, name: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None


class ChoiceOf:
    """An argument type: one of the names, with the nearest one named in the error.

    `list` prints all, a line each, and ends the program.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)

    def __call__(self, text: str) -> str:
        """The name itself."""
        if text == "list":
            print_once("\n".join(self.names))
            sys.exit(0)
        if text not in self.names:
            near = difflib.get_close_matches(text, self.names, n=1, cutoff=0.0)
            raise argparse.ArgumentTypeError(
                f"unknown name {text!r}, did you mean {near[0]}? Known: {', '.join(self.names)}"
            )
        return text


def add_switch(
    group: argparse._ArgumentGroup, name: str, default: bool | None, help: str, no_help: str
) -> None:
    """Add `--name` and `--no_name`."""
    group.add_argument(f"--{name}", action="store_true", default=default, help=help)
    group.add_argument(
        f"--no_{name}", dest=name, action="store_false", default=default, help=no_help
    )


def show_value(value: object) -> str:
    """The value of a flag as one types it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)
