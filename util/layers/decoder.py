"""The decoder of a masked autoencoder: from weights' shapes, to flags and arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from util.layers.architecture import count_blocks

# Heads of the decoders that the models' names stand for, by their width: of images (ConvMAE's and
# our tiny one) and of videos (VideoMAE's and ours); of another width, channels a head.
_HEADS = {2: {512: 16, 64: 2}, 3: {640: 8, 512: 8, 384: 6, 192: 3, 64: 2}}
_HEAD_DIM = {2: 32, 3: 64}


@dataclass(frozen=True)
class Decoder:
    """The part of a masked autoencoder beside its encoder; as arguments and as flags.

    Attributes:
        decoder_embed_dim: width.
        decoder_depth: transformer blocks.
        decoder_num_heads: attention heads.
        multi_scale: stages 1 and 2 are fused into what the decoder sees.
    """

    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    multi_scale: bool

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], flags: Mapping[str, object] | None = None
    ) -> "Decoder":
        """The decoder of an autoencoder's weights.

        Heads are not in the shapes. Without a flag that fits, a width that models of a name have
        has their number of heads, any other 32 channels a head, in videos 64.

        Args:
            shapes: name to shape; more names do no harm.
            flags: arguments of the run that wrote the weights, whatever they hold.

        Raises:
            ValueError: weights without a decoder, or whose blocks have a gap.
        """
        width, kernel = shapes.get("mask_token", ())[-1:], shapes.get("patch_embed1.proj.weight")
        if not width or not width[0] or kernel is None or len(kernel) not in (4, 5):
            raise ValueError("these are no weights of a masked autoencoder")
        (width,), ndim = width, len(kernel) - 2
        heads = (flags or {}).get("decoder_num_heads")
        if type(heads) is not int or heads < 1 or width % heads:
            wanted = _HEADS[ndim].get(width, width // _HEAD_DIM[ndim])
            heads = next(n for n in range(max(1, wanted), 0, -1) if width % n == 0)
        return cls(
            decoder_embed_dim=width,
            decoder_depth=count_blocks(shapes, "decoder_blocks."),
            decoder_num_heads=heads,
            multi_scale="stage1_output_decode.weight" in shapes,
        )
