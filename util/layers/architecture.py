"""The paper's model sizes, and the architecture of a ConvViT read off its weights' shapes."""

import math
from collections.abc import Mapping, Sequence

# Widths, blocks and MLP ratios of the three stages; "tiny" is ours.
SIZES = {
    "tiny": dict(embed_dim=(32, 64, 128), depth=(1, 1, 4), num_heads=2, mlp_ratio=(4, 4, 4)),
    "small": dict(embed_dim=(128, 256, 384), depth=(2, 2, 11), num_heads=6, mlp_ratio=(4, 4, 4)),
    "base": dict(embed_dim=(256, 384, 768), depth=(2, 2, 11), num_heads=12, mlp_ratio=(4, 4, 4)),
    "large": dict(embed_dim=(384, 768, 1024), depth=(2, 2, 23), num_heads=16, mlp_ratio=(8, 8, 4)),
    "huge": dict(embed_dim=(768, 1024, 1280), depth=(2, 2, 31), num_heads=16, mlp_ratio=(8, 8, 4)),
}


def read_architecture(
    shapes: Mapping[str, Sequence[int]], img_size: Sequence[int] | None = None
) -> dict[str, object]:
    """The constructor's arguments of the encoder that weights belong to.

    Heads are not in the shapes: a known width has its published number, any other 64 channels a
    head. Nor are the proportions of the input: without a hint that fits a picture is taken to be
    square, and a video to have 16 frames, or else the fewest that make its frames square.

    Args:
        shapes: name to shape, as in the published checkpoints; more names do no harm.
        img_size: what is known of the input, used if it has the number of tokens.

    Returns:
        `img_size`, `patch_size`, `in_chans`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio` and
        `class_token`; of a video model also `temporal_kernel`.

    Raises:
        ValueError: weights that are no ConvViT's.
    """
    try:
        projections = [tuple(shapes[f"patch_embed{s}.proj.weight"]) for s in (1, 2, 3)]
        tokens = shapes["pos_embed"][1]
        embed_dim = tuple(shape[0] for shape in projections)
    except KeyError as error:
        raise ValueError(f"these are no weights of a ConvViT: {error} is missing") from None
    patch_size = tuple(tuple(shape[2:]) for shape in projections)
    stride = tuple(math.prod(p) for p in zip(*patch_size, strict=True))
    class_token = "cls_token" in shapes
    depth = tuple(_depth(shapes, stage) for stage in (1, 2, 3))
    ratios = (
        shapes[f"blocks{stage}.0.mlp.fc1.weight"][0] / embed_dim[stage - 1] if blocks else 4
        for stage, blocks in enumerate(depth, start=1)
    )
    kernels = (shapes.get(f"blocks{s}.0.attn.weight", ()) for s in (1, 2))
    temporal = [kernel[2] for kernel in kernels if len(kernel) == 5]
    known_heads = {size["embed_dim"][2]: size["num_heads"] for size in SIZES.values()}
    return {
        "img_size": _img_size(tokens, class_token, stride, img_size),
        "patch_size": patch_size,
        "in_chans": projections[0][1],
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": known_heads.get(embed_dim[2], max(1, embed_dim[2] // 64)),
        "mlp_ratio": tuple(ratios),
        "class_token": class_token,
        **({"temporal_kernel": temporal[0]} if temporal else {}),
    }


def constructor_args(args: Mapping[str, object]) -> dict[str, object]:
    """The constructor's arguments that a run's arguments stand for, as far as they say.

    Args:
        args: `input_size` (an int or one entry a dimension of a picture), `patch_size` (the
            stages' strides in space) and `in_chans`; of a video run also `num_frames`, `tubelet`
            (frames of a cube, all in stage 1) and `temporal_kernel`.

    Returns:
        `img_size`, `patch_size`, `in_chans` and `temporal_kernel`, those that are known.
    """
    size, patch = args.get("input_size"), args.get("patch_size")
    if "num_frames" in args:
        size = (args["num_frames"], *((size, size) if isinstance(size, int) else size))
        times = (args["tubelet"], 1, 1)
        square = [(p, p) if isinstance(p, int) else p for p in patch]
        patch = tuple((t, *p) for t, p in zip(times, square, strict=True))
    known = {"img_size": size, "patch_size": patch, "in_chans": args.get("in_chans")}
    known |= {"temporal_kernel": args.get("temporal_kernel")}
    plain = {n: tuple(v) if isinstance(v, list) else v for n, v in known.items()}
    return {name: value for name, value in plain.items() if value is not None}


def flags_of(architecture: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a run, as `constructor_args` takes them, that an architecture stands for."""
    size, patch = architecture["img_size"], architecture["patch_size"]
    space = [tuple(entry[-2:]) for entry in patch]
    flags = {
        "input_size": list(size[-2:]),
        "patch_size": [entry[0] if len(set(entry)) == 1 else entry for entry in space],
        "in_chans": architecture["in_chans"],
    }
    if len(size) == 3:
        flags |= {"num_frames": size[0], "tubelet": patch[0][0]}
        flags |= {"temporal_kernel": architecture.get("temporal_kernel")}
    return flags


def grid_size(architecture: Mapping[str, object]) -> tuple[int, ...]:
    """Stage-3 tokens along each dimension."""
    strides = (math.prod(p) for p in zip(*architecture["patch_size"], strict=True))
    return tuple(s // p for s, p in zip(architecture["img_size"], strides, strict=True))


def _img_size(
    tokens: int, class_token: bool, stride: Sequence[int], hint: Sequence[int] | None
) -> tuple[int, ...]:
    """The input whose grid has that many tokens; one may be the class token's."""
    counts = (tokens, tokens - 1) if class_token else (tokens,)
    if hint and len(hint) == len(stride):
        grid = [s // p for s, p in zip(hint, stride, strict=True)]
        if math.prod(grid) in counts:
            return tuple(hint)
    lengths = (max(1, 16 // stride[0]), *range(1, tokens + 1)) if len(stride) == 3 else (1,)
    grids = ((n, length, math.isqrt(n // length)) for length in lengths for n in counts)
    found = ((length, side) for n, length, side in grids if length * side**2 == n)
    length, side = next(found, (1, math.isqrt(tokens)))
    return tuple(n * p for n, p in zip((length, side, side)[-len(stride) :], stride, strict=True))


def _depth(shapes: Mapping[str, Sequence[int]], stage: int) -> int:
    prefix = f"blocks{stage}."
    return 1 + max((int(n.split(".")[1]) for n in shapes if n.startswith(prefix)), default=-1)


def size_name(architecture: Mapping[str, object]) -> str:
    """Which of the known sizes an architecture is, "another size" if none."""
    for name, size in SIZES.items():
        if all(tuple(architecture[k]) == size[k] for k in ("embed_dim", "depth", "mlp_ratio")):
            return name
    return "another size"


def describe_architecture(architecture: Mapping[str, object]) -> str:
    """Size, widths, depths and so on, in a line."""

    def numbers(name: str) -> str:
        return "-".join(f"{value:g}" for value in architecture[name])

    return (
        f"{size_name(architecture)} (widths {numbers('embed_dim')}, blocks {numbers('depth')}, "
        f"MLP ratios {numbers('mlp_ratio')}, {architecture['num_heads']} heads"
        f"{', class token' if architecture['class_token'] else ''})"
    )
