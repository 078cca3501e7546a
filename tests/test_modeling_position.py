"""Sine position encoding and padding masks of the scales."""

import pytest
import torch

import reference
from helpers import IMAGE_SIZES, pixel_mask
from smca.modeling.position_encoding import SinePositionEncoding
from smca.modeling.scales import padding_masks


def cell_mask(height, width, *valid_sizes):
    mask = torch.ones(len(valid_sizes), height, width, dtype=torch.bool)
    for image_mask, (h, w) in zip(mask, valid_sizes, strict=True):
        image_mask[:h, :w] = False
    return mask


@pytest.mark.parametrize("num_features", [16, 128])
@pytest.mark.parametrize(
    "mask",
    [
        cell_mask(6, 8, (6, 8)),
        cell_mask(6, 8, (6, 8), (4, 8), (6, 3), (1, 1)),
        cell_mask(1, 1, (1, 1)),
        cell_mask(1, 9, (1, 9), (1, 4)),
    ],
    ids=["whole", "padded", "one cell", "one row"],
)
def test_equals_the_reference(mask, num_features):
    encoding = SinePositionEncoding(2 * num_features)(mask)
    expected = reference.sine_position_encoding(mask, num_features)
    assert encoding.dtype == torch.float32
    torch.testing.assert_close(encoding, expected, atol=1e-5, rtol=0)


def test_is_finite_where_an_image_has_no_valid_cell():
    encoding = SinePositionEncoding(32)(cell_mask(3, 4, (3, 4), (0, 0)))
    assert encoding.isfinite().all()


def test_half_precision_does_not_change_it():
    mask = cell_mask(6, 8, (6, 8), (4, 5))
    encode = SinePositionEncoding(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoding = encode(mask)
    torch.testing.assert_close(encoding, encode(mask))


@pytest.mark.parametrize("embed_dim", [6, 30, 33])
def test_a_width_that_cannot_be_split_is_an_error(embed_dim):
    with pytest.raises(ValueError, match=f"embed_dim={embed_dim} must be a multiple of 4"):
        SinePositionEncoding(embed_dim)


CPU = torch.device("cpu")


@pytest.mark.parametrize("image_sizes", [IMAGE_SIZES, [(203, 317), (251, 190)], [(33, 1), (1, 65)]])
def test_padding_masks_are_the_pixel_mask_at_the_nearest_pixel(image_sizes):
    pixels = pixel_mask(image_sizes)
    height, width = pixels.shape[1:]
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64)]
    masks = padding_masks(image_sizes, (height, width), sizes, CPU)
    assert len(masks) == len(sizes)
    for mask, size in zip(masks, sizes, strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, reference.resize_mask(pixels, *size))


def test_an_unpadded_batch_has_no_padding_mask():
    assert padding_masks([(64, 96)] * 2, (64, 96), [(4, 6), (2, 3)], CPU) == [None, None]


def test_scales_have_masks_together():
    # Three pixels of padding are part of one cell of 32 pixels, and more than one of 2 pixels.
    fine, coarse = padding_masks([(64, 64), (61, 64)], (64, 64), [(32, 32), (2, 2)], CPU)
    assert fine.any() and not coarse.any()
