"""The architecture of a ConvViT encoder: from flags, from weights' shapes, to arguments."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from util.layers.geometry import Geometry, show_size

# Widths, blocks and MLP ratios of the three stages; "tiny" is ours.
SIZES = {
    "tiny": dict(embed_dim=(32, 64, 128), depth=(1, 1, 4), num_heads=2, mlp_ratio=(4, 4, 4)),
    "small": dict(embed_dim=(128, 256, 384), depth=(2, 2, 11), num_heads=6, mlp_ratio=(4, 4, 4)),
    "base": dict(embed_dim=(256, 384, 768), depth=(2, 2, 11), num_heads=12, mlp_ratio=(4, 4, 4)),
    "large": dict(embed_dim=(384, 768, 1024), depth=(2, 2, 23), num_heads=16, mlp_ratio=(8, 8, 4)),
    "huge": dict(embed_dim=(768, 1024, 1280), depth=(2, 2, 31), num_heads=16, mlp_ratio=(8, 8, 4)),
}
# Of a model that neither flags nor weights decide; the last two of a video model.
_PICTURES = Geometry.of(224, (4, 2, 2))
NUM_FRAMES, TUBELET = 16, 2
# The flags of the blocks, whatever the input is.
BLOCK_FLAGS = ("embed_dim", "depth", "num_heads", "mlp_ratio", "kernel_size")


@dataclass(frozen=True)
class Architecture:
    """The things that a ConvViT encoder is built from; the defaults are the base image model's.

    The flags of a run, as `flags` and `with_flags` know them, are `input_size` (a number, or one
    each for height and width), `patch_size` (strides of the stages in space) and the fields of
    this class but `class_token`; of a video model also `num_frames`, `tubelet` (frames of a cube,
    all in stage 1) and `temporal_kernel`.

    Attributes:
        geometry: size of the input, strides of the stages.
        in_chans: channels of the input.
        embed_dim: width of each stage.
        depth: blocks of each stage.
        num_heads: attention heads of stage 3.
        mlp_ratio: hidden width of the MLPs over the stage's width, for each stage.
        class_token: a token before those of the grid, as the v2 checkpoints have it.
        kernel_size: extent in space of the depthwise convolutions of stages 1 and 2.
        temporal_kernel: their extent in time in a video model.
    """

    geometry: Geometry = _PICTURES
    in_chans: int = 3
    embed_dim: tuple[int, ...] = (256, 384, 768)
    depth: tuple[int, ...] = (2, 2, 11)
    num_heads: int = 12
    mlp_ratio: tuple[float, ...] = (4, 4, 4)
    class_token: bool = False
    kernel_size: int = 5
    temporal_kernel: int = 3

    @classmethod
    def named(cls, model: str) -> "Architecture":
        """The image architecture of a model's name, such as "convvit_base_patch16".

        Raises:
            ValueError: a name without one of `SIZES` in it.
        """
        size = next((part for part in model.split("_") if part in SIZES), None)
        if size is None:
            raise ValueError(f"model {model} names none of the sizes {', '.join(SIZES)}")
        return cls(**SIZES[size])

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], flags: Mapping[str, object] | None = None
    ) -> "Architecture":
        """The architecture that weights belong to.

        Neither heads nor the proportions of the input are in the shapes, and of an MLP ratio only
        what it comes to. Without flags that fit, a published width has its published number of
        heads, any other 64 channels a head; a picture is as square as its tokens allow; a video has
        16 frames if that makes them square, else the fewest that do.

        Args:
            shapes: name to shape, as in the published checkpoints; more names do no harm.
            flags: arguments of the run that wrote the weights, whatever they hold.

        Raises:
            ValueError: weights that are no ConvViT's, or whose blocks have a gap.
        """
        names = [f"patch_embed{stage}.proj.weight" for stage in (1, 2, 3)] + ["pos_embed"]
        for name in names:
            if name not in shapes:
                raise ValueError(f"these are no weights of a ConvViT: {name!r} is missing")
        projections, table = [tuple(shapes[name]) for name in names[:3]], tuple(shapes["pos_embed"])
        ndim = len(projections[0]) - 2
        if (
            {len(shape) for shape in projections} not in ({4}, {5})
            or len(table) != 3
            or min(map(min, (*projections, table))) < 1
        ):
            found = ", ".join(f"{name} {show_size(shapes[name]) or 'a number'}" for name in names)
            raise ValueError(f"these are no weights of a ConvViT, by the shapes of {found}")
        flags = flags or {}
        embed_dim = tuple(shape[0] for shape in projections)
        patch_size = tuple(shape[2:] for shape in projections)
        class_token = "cls_token" in shapes
        depth = tuple(count_blocks(shapes, f"blocks{stage}.") for stage in (1, 2, 3))
        # The MLPs of an autoencoder's decoder have the first stage's ratio.
        mlps = ["decoder_blocks.0", *(f"blocks{stage}.0" for stage in (1, 2, 3))]
        fc1 = [tuple(shapes.get(f"{block}.mlp.fc1.weight", ()))[:2] for block in mlps]
        kernels = [shapes.get(f"blocks{stage}.0.attn.weight", ())[2:] for stage in (1, 2)]
        kernel = next((kernel for kernel in kernels if len(kernel) == ndim), (3, 5, 5))
        return cls(
            geometry=_guess_geometry(table[1], class_token, patch_size, flags),
            in_chans=projections[0][1],
            embed_dim=embed_dim,
            depth=depth,
            num_heads=_guess_heads(embed_dim[2], flags),
            mlp_ratio=tuple(
                _guess_ratio([shape for shape in stage if shape], hint)
                for stage, hint in zip((fc1[:2], fc1[2:3], fc1[3:]), _ratios(flags), strict=True)
            ),
            class_token=class_token,
            kernel_size=kernel[-1],
            temporal_kernel=kernel[0] if len(kernel) == 3 else 3,
        )

    @property
    def ndim(self) -> int:
        """Dimensions of the input: 2 for pictures, 3 for videos."""
        return self.geometry.ndim

    @property
    def img_size(self) -> tuple[int, ...]:
        """Size of the input in pixels; a video's frames first."""
        return self.geometry.img_size

    @property
    def grid(self) -> tuple[int, ...]:
        """Stage-3 tokens along each dimension."""
        return self.geometry.grid(3)

    @property
    def stride(self) -> tuple[int, ...]:
        """Input pixels under one stage-3 token along each dimension."""
        return self.geometry.stride(3)

    @property
    def size_name(self) -> str | None:
        """The name of this size in `SIZES`, None if it has none."""
        known = ((name, Architecture(**size)) for name, size in SIZES.items())
        return next((name for name, other in known if self.has_blocks(other)), None)

    @property
    def hidden_dim(self) -> tuple[int, ...]:
        """Width within the MLPs of each stage."""
        return tuple(
            int(dim * ratio) for dim, ratio in zip(self.embed_dim, self.mlp_ratio, strict=True)
        )

    def has_blocks(self, other: "Architecture") -> bool:
        """True if stages have the same widths, depths and MLPs in both."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("embed_dim", "depth", "hidden_dim")
        )

    def check_blocks(self) -> None:
        """Refuse blocks that cannot be made.

        Raises:
            ValueError: heads that do not divide the width, or an MLP without a channel.
        """
        width = self.embed_dim[2]
        if width % self.num_heads:
            raise ValueError(f"width {width} of stage 3 is not divisible by {self.num_heads} heads")
        for stage, hidden in enumerate(self.hidden_dim, start=1):
            if not hidden:
                raise ValueError(
                    f"MLP ratio {self.mlp_ratio[stage - 1]:g} leaves stage {stage}, "
                    f"{self.embed_dim[stage - 1]} wide, no hidden channel"
                )

    def with_blocks(self, flags: Mapping[str, object]) -> "Architecture":
        """The same with the values that flags give of the blocks; None is not given."""
        given = {name: flags[name] for name in BLOCK_FLAGS if flags.get(name) is not None}
        lists = {name: tuple(v) if isinstance(v, Sequence) else v for name, v in given.items()}
        return replace(self, **lists)

    def encoder_kwargs(self) -> dict[str, object]:
        """Arguments of `ConvViTEncoder`."""
        kwargs = {f.name: getattr(self, f.name) for f in fields(self)}
        del kwargs["geometry"], kwargs["class_token"]
        return {"img_size": self.img_size, "patch_size": self.geometry.patch_size, **kwargs}

    def kwargs(self) -> dict[str, object]:
        """Arguments of `ConvViT` and of the masked autoencoder."""
        return {**self.encoder_kwargs(), "class_token": self.class_token}

    def flags(self) -> dict[str, object]:
        """The flags of a run, see the class, that stand for this architecture."""
        times = [entry[:-2] for entry in self.geometry.patch_size]
        space = [_scalar(entry[-2:]) for entry in self.geometry.patch_size]
        flags = {
            "input_size": list(self.img_size[-2:]),
            "patch_size": space,
            "in_chans": self.in_chans,
            "embed_dim": list(self.embed_dim),
            "depth": list(self.depth),
            "num_heads": self.num_heads,
            "mlp_ratio": list(self.mlp_ratio),
            "kernel_size": self.kernel_size,
        }
        if self.ndim == 3:
            flags |= {"num_frames": self.img_size[0], "tubelet": times[0][0]}
            flags |= {"temporal_kernel": self.temporal_kernel}
            if times[1:] != [(1,), (1,)]:  # strides in time that no tubelet stands for
                flags["patch_size"] = list(self.geometry.patch_size)
        return flags

    def with_flags(self, flags: Mapping[str, object]) -> "Architecture":
        """The same with the values that the flags of a run give; None is not given.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        self.with_blocks(flags).check_blocks()
        start = self.with_time() if self.ndim == 2 and flags.get("num_frames") else self
        known = start.flags()
        known |= {name: flags[name] for name in known if flags.get(name) is not None}
        size, patch = _pair(known["input_size"]), known["patch_size"]
        if start.ndim == 3:
            size = (known["num_frames"], *size)
            times = (known["tubelet"], 1, 1)
            patch = [
                entry if isinstance(entry, Sequence) and len(entry) == 3 else (time, *_pair(entry))
                for time, entry in zip(times, patch, strict=True)
            ]
        return replace(
            self.with_blocks(flags),
            geometry=Geometry.of(size, patch),
            in_chans=known["in_chans"],
            temporal_kernel=known.get("temporal_kernel", self.temporal_kernel),
        )

    def with_time(self, num_frames: int = NUM_FRAMES, tubelet: int = TUBELET) -> "Architecture":
        """The video architecture that looks at each frame as this image architecture does.

        Raises:
            ValueError: a cube that does not divide the frames.
        """
        size, patch = self.geometry.img_size, self.geometry.patch_size
        cubes = zip((tubelet, 1, 1), patch, strict=True)
        geometry = Geometry.of((num_frames, *size), [(time, *entry) for time, entry in cubes])
        return replace(self, geometry=geometry)

    def __str__(self) -> str:
        """Size, widths, depths and so on, in a line."""

        def numbers(values: Iterable[float]) -> str:
            return "-".join(f"{value:g}" for value in values)

        return (
            f"{self.size_name or 'another size'} (widths {numbers(self.embed_dim)}, "
            f"blocks {numbers(self.depth)}, MLP ratios {numbers(self.mlp_ratio)}, "
            f"{self.num_heads} heads{', class token' if self.class_token else ''})"
        )


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Blocks `<prefix>0`, `<prefix>1`, … of a stage.

    Raises:
        ValueError: one that is not the next.
    """
    found = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
    depth = next(i for i in itertools.count() if str(i) not in found)
    beyond = sorted(found - set(map(str, range(depth))))
    if beyond:
        raise ValueError(f"{prefix}{beyond[0]} is there, but {prefix}{depth} is missing")
    return depth


def _ratios(flags: Mapping[str, object]) -> Sequence[object]:
    """The flags' MLP ratios of the three stages, whatever they hold."""
    ratios = flags.get("mlp_ratio")
    return ratios if isinstance(ratios, list | tuple) and len(ratios) == 3 else (None,) * 3


def _guess_ratio(mlps: Sequence[tuple[int, int]], hint: object) -> float:
    """An MLP ratio by which `int(width * ratio)` is the hidden width of each MLP.

    Args:
        mlps: hidden width and width of MLPs of one ratio; without any, 4.
        hint: what the flags say, taken if it fits.
    """

    def fits(ratio: float) -> bool:
        return all(int(width * ratio) == hidden for hidden, width in mlps)

    if isinstance(hint, int | float) and 0 < hint < math.inf and fits(hint):
        return hint
    ratio = max((hidden / width for hidden, width in mlps), default=4)
    # Whatever the division rounds.
    return ratio if fits(ratio) else math.nextafter(ratio, math.inf)


def _guess_heads(width: int, flags: Mapping[str, object]) -> int:
    """The flags' number of heads, the published one of that width, or 64 channels a head."""
    hint = _numbers(flags.get("num_heads"))
    if len(hint) == 1 and width % hint[0] == 0:
        return hint[0]
    published = {size["embed_dim"][2]: size["num_heads"] for size in SIZES.values()}
    fitting = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    return published.get(width, fitting)


def _guess_geometry(
    tokens: int,
    class_token: bool,
    patch_size: Sequence[tuple[int, ...]],
    flags: Mapping[str, object],
) -> Geometry:
    """The input whose grid has that many tokens; one of them may be the class token's."""
    stride = tuple(math.prod(p) for p in zip(*patch_size, strict=True))
    counts = [n for n in ((tokens, tokens - 1) if class_token else (tokens,)) if n]
    frames, size = _numbers(flags.get("num_frames")), _numbers(flags.get("input_size"))
    hint = (*frames, *(size * 2 if len(size) == 1 else size))
    if len(hint) == len(stride):
        grid = [divmod(s, p) for s, p in zip(hint, stride, strict=True)]
        if not any(rest for _, rest in grid) and math.prod(n for n, _ in grid) in counts:
            return Geometry.of(hint, patch_size)
    if len(stride) == 2:
        grids = [(n // side, side) for n in counts if (side := math.isqrt(n)) ** 2 == n]
        n = counts[-1]
        side = next(side for side in range(math.isqrt(n), 0, -1) if n % side == 0)
        grids.append((side, n // side))
    else:
        length = max(1, NUM_FRAMES // stride[0])
        grids = [
            (length, side, side)
            for n in counts
            if n % length == 0 and (side := math.isqrt(n // length)) ** 2 * length == n
        ]
        n = counts[-1]
        side = next(side for side in range(math.isqrt(n), 0, -1) if n % side**2 == 0)
        grids.append((n // side**2, side, side))
    return Geometry.of([g * p for g, p in zip(grids[0], stride, strict=True)], patch_size)


def _numbers(value: object) -> tuple[int, ...]:
    """A flag's positive whole numbers; none if it holds anything else."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if all(isinstance(v, int) and v > 0 for v in values) else ()


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width of a number, or of one or two in a list."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _scalar(pair: tuple[int, ...]) -> int | tuple[int, ...]:
    """The number of equal ones, as flags have it."""
    return pair[0] if len(set(pair)) == 1 else pair
