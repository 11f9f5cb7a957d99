"""Go on from a checkpoint of the original code (and of MAE's, whose format it has).

Such a file holds model, optimizer, epoch (the last one finished, from 0), the scaler's state and
the arguments. Its optimizer counts parameters in the order in which the original model names them,
which is that of its state dict; here they are matched by name.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from util.errors import UsageError, printable
from util.weights.describe import epochs_done
from util.weights.read import weights_of

# What a run of the original was, by the kind of its weights.
_PROGRAMS = {"autoencoder": "pretraining", "classifier": "fine-tuning", "probe": "probing"}
# Arguments that need not agree: the random numbers are others anyway, `lr` follows from `blr`, and
# where the weights first came from does not matter any more.
_FREE = {"blr", "finetune", "seed"}


def is_original(content: Mapping) -> bool:
    """True for contents in the original's format."""
    ours = {"step", "random_state", "meters", "program"}
    return {"model", "optimizer", "epoch", "args"} <= content.keys() and not ours & content.keys()


def as_content(content: Mapping, path: str | Path) -> dict[str, object]:
    """An original checkpoint's contents with this framework's entries.

    The optimizer's state is still in the original's order, see `match_optimizer`.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        UsageError: entries that are not what the original writes.
    """
    weights = weights_of({name: content[name] for name in ("model", "epoch", "args")}, path)
    program = _PROGRAMS.get(weights.kind)
    if program is None or not weights.args or "epoch" not in weights.info:
        raise UsageError(
            f"--resume {path} holds no training state: neither of this program nor of the "
            f"original code (model, optimizer, epoch and args of a run)"
        )
    return {
        "original": True,
        "program": program,
        "model": weights.state,
        "optimizer": content["optimizer"],
        "scaler": {
            "scaler": content.get("scaler") or {},
            "skipped": 0.0,
            "skipped_in_a_row": 0.0,
        },
        "epoch": epochs_done(weights.info),
        "step": 0,
        "random_state": [],
        "args": weights.args,
    }


def comparable_args(saved: Mapping[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """A run's arguments as the original would have saved them, for `check_same_run`.

    Args:
        saved: the original's arguments.
        now: this run's, as plain values.

    Returns:
        `now`, with the values of `saved` where the two mean the same.
    """
    # A model that is read off the file has no name here.
    unnamed = {"model"} if now.get("model") is None else set()
    both = {n: saved[n] for n in now.keys() & saved.keys() - _FREE - unnamed}
    if "complementary" in now:  # the original says it in the model's name
        both["complementary"] = str(saved.get("model")).startswith("fastconvmae") or None
    # What the original does not have.
    later = ("predict_share", "teacher", "teacher_digest", "mimic_dim", "mimic_weight")
    both |= {name: None for name in later if name in now}
    if _model_name(both) == _model_name(now):
        both |= {"model": now["model"]} if "model" in both else {}
    if isinstance(size := both.get("input_size"), int):
        both["input_size"] = [size, size]
    if "aa" in both:
        both["aa"] = both["aa"] or "none"
        if both["aa"] != "none":
            both.pop("color_jitter", None)  # not used
    if both.get("color_jitter", 0) is None:
        both["color_jitter"] = 0.0
    batch = [saved.get(name, 1) for name in ("batch_size", "accum_iter", "world_size")]
    if "batch_size" in saved and all(isinstance(n, int) for n in batch):
        both["effective_batch_size"] = math.prod(batch)
    return {**now, **both}


def _model_name(args: Mapping[str, object]) -> str:
    """The model's name without what the original puts behind that of the base model."""
    return str(args.get("model")).removesuffix("_dec512d8b")


def match_optimizer(
    saved: Mapping, names: Sequence[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[int, dict]:
    """The state of an original's optimizer for this one's parameters.

    The original groups them as this framework does. Pretraining has two groups, without and with
    weight decay (timm's `add_weight_decay`); fine-tuning one for each layer and decay, in the order
    in which the first parameter of each comes (MAE's `param_groups_lrd`); probing has one.

    Args:
        saved: the state dict of the original's optimizer.
        names: of the original model's weights, in their order there.
        model: whose parameters `optimizer` has, by the same names.
        optimizer: to go on with.

    Returns:
        State by the parameter's number in `optimizer`.

    Raises:
        ValueError: another number of groups or parameters, or other settings of a group.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    group_of = {name: i for i, group in enumerate(ours) for name in group}
    by_layer = any("lr_scale" in group for group in optimizer.param_groups)
    there: dict[int, list[str]] = {} if by_layer else {i: [] for i in range(len(ours))}
    for name in names:
        if name in group_of:
            there.setdefault(group_of[name], []).append(name)

    groups = saved["param_groups"]
    counts, wanted = [len(g["params"]) for g in groups], [len(group) for group in there.values()]
    if counts != wanted:
        raise ValueError(f"its optimizer has groups of {counts} parameters, this run's {wanted}")
    for group, i in zip(groups, there, strict=True):
        for setting in ("weight_decay", "lr_scale"):
            values = [g.get(setting, 1.0) for g in (group, optimizer.param_groups[i])]
            numbers = all(isinstance(value, int | float) for value in values)
            if not numbers or not math.isclose(*values, rel_tol=1e-6, abs_tol=1e-12):
                raise ValueError(
                    f"a group of its optimizer has a {setting} of {printable(values[0])}, this "
                    f"run's has {values[1]:g}"
                )
    number_there = {
        name: number
        for group, members in zip(groups, there.values(), strict=True)
        for number, name in zip(group["params"], members, strict=True)
    }
    flat = [name for group in ours for name in group]
    found = {i: saved["state"].get(number_there[name]) for i, name in enumerate(flat)}
    return {i: _modern(state) for i, state in found.items() if state is not None}


def _modern(state: object) -> object:
    """A parameter's state as torch keeps it today: AdamW's step was a plain number once."""
    if not isinstance(state, Mapping):
        return state
    step = state.get("step")
    if isinstance(step, int | float):
        return {**state, "step": torch.tensor(float(step))}
    if isinstance(step, Tensor):
        return {**state, "step": step.to(torch.float32)}
    return dict(state)
