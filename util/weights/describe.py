"""Descriptions of weight files, for people."""

from collections.abc import Sequence

from util.layers.geometry import show_size
from util.weights.read import KINDS, Weights


def describe(weights: Weights) -> str:
    """A few lines on a file: its kind, its model, its run, and the commands that take it."""
    architecture, epoch = weights.architecture, weights.info.get("epoch")
    kind = KINDS[weights.kind]
    kind += f" of {weights.num_classes} classes" if weights.num_classes else ""
    kind += ", averaged (EMA)" if "ema" in weights.entry else ""
    count = sum(t.numel() for t in weights.state.values() if t.is_floating_point())
    said = [weights.info.get("program"), weights.args.get("model")]
    said += [] if epoch is None else [f"{epoch} epochs done"]
    rows = {
        "file": f"{weights.path} ({weights.path.stat().st_size / 1e6:.1f} MB)",
        "kind": kind,
        "model": f"{architecture}, {count / 1e6:.1f} M numbers in all",
        "input": f"{show_size(architecture.img_size)} pixels, "
        f"{architecture.in_chans} channels, "
        f"{show_size(architecture.grid)} patches of {show_size(architecture.stride)}",
        "run": ", ".join(map(str, filter(None, said))),
        "classes": _some(weights.classes) if weights.classes else None,
        "use": _USES[weights.kind].format(file=weights.path),
    }
    return "\n".join(f"{name:9}{text}" for name, text in rows.items() if text)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", … {names[-1]}" if len(names) > most else "")


_USES = {
    "autoencoder": "main_finetune.py or main_linprobe.py --finetune {file}; python -m "
    "tools.visualize --checkpoint {file}",
    "encoder": "main_finetune.py or main_linprobe.py --finetune {file}",
    "classifier": "main_finetune.py --eval --resume {file}; or --finetune {file} for new classes",
    "probe": "main_linprobe.py --eval --resume {file}",
    "segmentor": "python -m SEG.test CONFIG {file}",
    "detector": "python -m DET.train_net --config-file CONFIG --eval-only "
    "train.init_checkpoint={file}; python -m DET.predict --config-file CONFIG --checkpoint {file} "
    "IMAGES --out DIR",
}
