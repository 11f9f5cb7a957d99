"""The decoder read off an autoencoder's shapes, beside that of the model itself."""

import pytest
import torch

from models_convmae import MODELS
from util.layers.decoder import Decoder
from VideoConvMAE.models import MODELS as VIDEO_MODELS


def shapes_of(factory, **kwargs):
    with torch.device("meta"):
        model = factory(**kwargs)
    return model, {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [*MODELS, *VIDEO_MODELS])
def test_the_decoder_of_each_name_is_read_off_shapes_alone(name):
    model, shapes = shapes_of((MODELS | VIDEO_MODELS)[name])
    assert Decoder.from_shapes(shapes) == Decoder(
        model.decoder_embed.out_features,
        len(model.decoder_blocks),
        model.decoder_blocks[0].attn.num_heads,
        hasattr(model, "stage1_output_decode"),
    )


@pytest.mark.parametrize(("heads", "taken"), [(6, 6), (5, 3), ("6", 3), (None, 3)])
def test_heads_are_those_of_the_flags_where_they_fit(heads, taken):
    _, shapes = shapes_of(
        MODELS["convmae_convvit_tiny_patch16"], decoder_embed_dim=96, decoder_num_heads=3
    )
    assert Decoder.from_shapes(shapes, {"decoder_num_heads": heads}).decoder_num_heads == taken


def test_an_encoder_alone_has_no_decoder():
    with pytest.raises(ValueError, match="no weights of a masked autoencoder"):
        Decoder.from_shapes({"patch_embed1.proj.weight": (8, 3, 4, 4)})
