"""Descriptions of weight files, for people."""

from collections.abc import Mapping, Sequence

from util.errors import printable
from util.layers.geometry import show_size
from util.weights.read import KINDS, RECIPE, Weights


def describe(weights: Weights) -> str:
    """A few lines on a file: its kind, its model, its run, and the commands that take it."""
    architecture, epochs = weights.architecture, epochs_done(weights.info)
    kind = KINDS[weights.kind]
    kind += f" of {weights.num_classes} classes" if weights.num_classes else ""
    kind += ", averaged (EMA)" if "ema" in weights.entry else ""
    count = sum(t.numel() for t in weights.state.values() if t.is_floating_point())
    said = [weights.info.get("program"), weights.args.get("model")]
    if "teacher" in weights.args:
        digest = weights.args.get("teacher_digest")
        said.append(f"teacher {printable(weights.args['teacher'])} (weights {printable(digest)})")
    said += [] if epochs is None else [f"{epochs} epoch{'s' * (epochs != 1)} done"]
    rows = {
        "file": f"{weights.path} ({weights.path.stat().st_size / 1e6:.1f} MB)",
        "kind": kind,
        "model": f"{architecture}, {count / 1e6:.1f} M numbers in all",
        "input": f"{show_size(architecture.img_size)} pixels, "
        f"{architecture.in_chans} channels, "
        f"{show_size(architecture.grid)} patches of {show_size(architecture.stride)}"
        f"{_arrays(weights.args)}",
        "images": f"normalised by {show_stats(weights.stats)}" if weights.stats else None,
        "decoder": _decoder(weights) if weights.kind == "autoencoder" else None,
        "guessed": guesses(weights),
        "run": ", ".join(map(str, filter(None, said))),
        "recipe": _recipe(weights.args),
        "best": _best(weights.info),
        "classes": _some(weights.classes) if weights.classes else None,
        "use": _USES[weights.kind].format(file=weights.path),
    }
    return "\n".join(f"{name:9}{text}" for name, text in rows.items() if text)


def _decoder(weights: Weights) -> str:
    decoder = weights.decoder
    fused = "stages 1 and 2 fused in" if decoder.multi_scale else "of stage 3 alone"
    return (
        f"{decoder.decoder_embed_dim} wide, {decoder.decoder_depth} blocks, "
        f"{decoder.decoder_num_heads} heads, {fused}"
    )


def show_stats(stats: Sequence[Sequence[float]]) -> str:
    """Mean and deviation of each channel as flags, as `tools.mean_std` prints them."""
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in stats)
    return f"--mean {mean} --std {std}"


def guesses(weights: Weights) -> str | None:
    """A few words on what a file does not say of its model; None if it says all."""
    published = {"num_heads"} if weights.architecture.size_name else set()
    guessed = {name: value for name, value in weights.guessed.items() if name not in published}
    taken = ", ".join(f"{name} {value}" for name, value in guessed.items())
    return f"{taken}: neither shapes nor arguments say it" if taken else None


def epochs_done(info: Mapping[str, object]) -> int | None:
    """Whole epochs that a run had done when it wrote a file; None if the file does not say.

    This framework's checkpoints count the epochs that are done, those of the original code (and
    of MAE and timm) name the last one, from 0.

    Args:
        info: of `Weights`.
    """
    epoch = info.get("epoch")
    ours = "program" in info or "step" in info
    return epoch if epoch is None or ours else epoch + 1


def _arrays(args: Mapping[str, object]) -> str:
    """A few words on the files of a run on arrays; none on those of pictures."""
    if not args.get("arrays"):
        return ""
    bands = f", bands {' '.join(map(str, args['bands']))}" if "bands" in args else ""
    return f", arrays{bands}" + (f", no data {args['nodata']:g}" if "nodata" in args else "")


def _recipe(args: Mapping[str, object]) -> str:
    """The recipe's main values, as far as the file has them."""
    said = [f"{name} {args[name]:g}" for name in RECIPE if name in args]
    return ", ".join(said + [n for n in ("norm_pix_loss", "complementary") if args.get(n)])


def _best(info: Mapping[str, object]) -> str | None:
    """The best accuracy of a classifier's run, if there was an evaluation."""
    acc1 = info["best"]["acc1"] if "best" in info else -1
    return f"{acc1:.3f} % top 1" if acc1 >= 0 else None


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", … {names[-1]}" if len(names) > most else "")


_USES = {
    "autoencoder": "main_finetune.py or main_linprobe.py --finetune {file}; python -m "
    "tools.visualize --checkpoint {file}; main_pretrain.py --finetune {file} to begin with",
    "encoder": "main_finetune.py, main_linprobe.py or main_pretrain.py --finetune {file}",
    "classifier": "main_finetune.py --eval --resume {file}; or --finetune {file} for new classes",
    "probe": "main_linprobe.py --eval --resume {file}",
    "segmentor": "python -m SEG.test CONFIG {file}",
    "detector": "python -m DET.train_net --config-file CONFIG --eval-only "
    "train.init_checkpoint={file}; python -m DET.predict --config-file CONFIG --checkpoint {file} "
    "IMAGES --out DIR",
}
