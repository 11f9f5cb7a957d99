"""The one check of a run's saved state: its entries, and that they fit what goes on from them."""

from collections.abc import Mapping
from numbers import Number

import torch
from torch import Tensor

from util.errors import UsageError, printable
from util.weights.unpickle import Foreign

# Entries of a parameter's state, by the optimizer's name.
_MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "LARS": {"mu"}}


def _is_plain(value: object) -> bool:
    """True for a value such as command lines give, within bounds."""
    todo, count = [value], 0
    while todo:
        value, count = todo.pop(), count + 1
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif not (value is None or isinstance(value, bool | int | float | str)):
            return False
        if count > 10_000:  # lists of the same lists, for one
            return False
    return True


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_group(value: object) -> bool:
    numbers = value.get("params") if _is_mapping(value) else None
    return _is_list(numbers) and all(map(_is_count, numbers))


# What each entry is, in words and as a test; the parts are compared by `compare_state`.
_ENTRIES = {
    "model": ("a state dict", _is_mapping),
    "optimizer": (
        "a state dict",
        lambda v: (
            _is_mapping(v)
            and _is_mapping(v.get("state"))
            and _is_list(v.get("param_groups"))
            and all(map(_is_group, v["param_groups"]))
        ),
    ),
    "scaler": ("a state dict", _is_mapping),
    "epoch": ("a count", _is_count),
    "step": ("a count", _is_count),
    "random_state": ("a list", lambda v: _is_list(v) and all(map(_is_mapping, v))),
    "args": ("plain values by name", lambda v: _is_mapping(v) and _is_plain(v)),
}
_OPTIONAL = {
    "program": ("text", lambda v: isinstance(v, str)),
    "num_images": ("a count", _is_count),
    "classes": ("a list of names", lambda v: _is_list(v) and all(isinstance(n, str) for n in v)),
}


def check_content(content: Mapping, title: str) -> None:
    """Refuse contents that are no training state.

    Args:
        content: of a checkpoint.
        title: the file, for messages.

    Raises:
        UsageError: entries that are missing or of another type.
    """
    within_epoch = _is_count(content.get("step")) and content["step"] > 0
    needed = _ENTRIES.keys() | ({"num_images"} if within_epoch else set())
    if missing := needed - content.keys():
        raise UsageError(
            f"{title}: it holds no training state of this program (no {', '.join(sorted(missing))})"
        )
    for name, (form, fits) in (_ENTRIES | _OPTIONAL).items():
        if name in content and not fits(content[name]):
            raise UsageError(f"{title}: its {name} is {_shown(content[name])}, it must be {form}")


def compare_state(name: str, saved: object, own: object, skip: tuple[str, ...] = ()) -> None:
    """Refuse a state that is of another form than the one it is to replace.

    Args:
        name: of the state, for messages.
        saved: to load.
        own: what is there now.
        skip: entries that are compared elsewhere.

    Raises:
        ValueError: naming the first difference.
    """
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"its {name} is {_shown(saved)}, it must be a state dict")
        if name.endswith("scaler") and (not own or (not saved and "growth_factor" in own)):
            return  # one of the two runs has no float16
        for kind, keys in (
            ("lacks", own.keys() - saved.keys()),
            ("has besides", saved.keys() - own.keys()),
        ):
            if keys:
                some = ", ".join(sorted(map(printable, keys))[:3])
                more = f" … ({len(keys)} in all)" if len(keys) > 3 else ""
                raise ValueError(f"its {name} {kind} {some}{more}")
        for key, value in own.items():
            if key not in skip:
                compare_state(f"{name}.{key}", saved[key], value)
    elif isinstance(own, Tensor):
        _compare_tensor(name, saved, own)
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(f"its {name} is {_shown(saved)}, it must be {len(own)} entries")
        for i, (a, b) in enumerate(zip(saved, own, strict=True)):
            compare_state(f"{name}.{i}", a, b)
    elif isinstance(own, Number) and not isinstance(own, bool):
        if not isinstance(saved, int | float) or isinstance(saved, bool):
            raise ValueError(f"its {name} is {_shown(saved)}, it must be a number")
    elif own is not None and type(saved) is not type(own):
        raise ValueError(f"its {name} is {_shown(saved)}, it must be {_shown(own)}")


def compare_moments(
    name: str, saved: Mapping, optimizer: torch.optim.Optimizer, started: bool
) -> None:
    """Refuse an optimizer's state that does not fit its parameters.

    Args:
        name: for messages.
        saved: state by the parameter's number.
        optimizer: to go on with.
        started: whether steps were taken, so that each parameter must have a state.

    Raises:
        ValueError: naming the first difference.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if odd := [number for number in saved if number not in range(len(parameters))]:
        raise ValueError(f"its {name} has a state for parameter {printable(odd[0])}, which is none")
    wanted = _MOMENTS.get(type(optimizer).__name__)
    for number, parameter in enumerate(parameters):
        state = saved.get(number)
        if state is None and not started:
            continue
        if not isinstance(state, Mapping) or (wanted and wanted != state.keys()):
            keys = ", ".join(sorted(wanted or {"a state"}))
            raise ValueError(f"its {name} lacks {keys} of parameter {number}, or has others")
        for key, value in state.items():
            title = f"{name}.state.{number}.{printable(key)}"
            if key == "step":
                compare_state(title, value, torch.zeros(()))
                if not value > 0:
                    raise ValueError(f"its {title} is {_shown(value)}, it must be more than 0")
            elif isinstance(value, Tensor):
                _compare_tensor(title, value, parameter)
            else:
                raise ValueError(f"its {title} is {_shown(value)}, it must be a tensor")


def _compare_tensor(name: str, saved: object, own: Tensor) -> None:
    if (
        not isinstance(saved, Tensor)
        or saved.shape != own.shape
        or saved.is_floating_point() != own.is_floating_point()
        or saved.is_complex()
    ):
        raise ValueError(f"its {name} is {_shown(saved)}, it must be {_shown(own)}")


def _shown(value: object) -> str:
    """A value for a message: its kind, and what it is if that is short."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} of shape {[*value.shape]}" if value.ndim else f"a single {kind}"
    if isinstance(value, Foreign):
        return f"a {printable(value.kind)}"
    if isinstance(value, int | float | str) or value is None:
        return printable(repr(value), 40)
    return f"a {type(value).__name__}"
