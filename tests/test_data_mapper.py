import errno
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils import logger
from PIL import Image

from smca.data import DetrDatasetMapper, detr_augmentations, mapper, read_image
from smca.data.mapper import check_image
from smca.errors import DatasetError


def _rgb(height=12, width=20):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _save(image, path, **options):
    image.save(path, **options)
    return str(path)


def _exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def _record(path, boxes=(), crowd=(), height=12, width=20):
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": i, "iscrowd": i in crowd}
        for i, box in enumerate(boxes)
    ]
    size = {"height": height, "width": width}
    return {"file_name": path, "image_id": 7, **size, "annotations": annotations}


@pytest.fixture
def png(tmp_path):
    return _save(Image.fromarray(_rgb()), tmp_path / "image.png")


# Reading


GRAY = _rgb()[..., 0]


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(_rgb()), _rgb()),
        (Image.fromarray(GRAY), np.repeat(GRAY[..., None], 3, axis=2)),
        (Image.fromarray(GRAY > 127), np.repeat((GRAY[..., None] > 127) * 255, 3, axis=2)),
        (Image.fromarray(np.dstack([_rgb(), GRAY])), _rgb()),  # transparency is dropped
        (Image.new("CMYK", (20, 12), (255, 0, 0, 0)), np.full((12, 20, 3), [0, 255, 255])),
    ],
)
def test_images_of_any_mode_are_read_in_rgb(tmp_path, image, expected):
    path = _save(image, tmp_path / ("a.tif" if image.mode == "CMYK" else "a.png"))
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([0, 90])}])
def test_palette_colors_are_looked_up(tmp_path, options):
    image = Image.fromarray((_rgb()[..., 0] % 2), mode="L").convert("P")
    image.putpalette([10, 20, 30, 200, 210, 220])
    path = _save(image, tmp_path / "palette.png", **options)
    colors = np.array([[10, 20, 30], [200, 210, 220]])
    np.testing.assert_array_equal(read_image(path), colors[_rgb()[..., 0] % 2])


@pytest.mark.parametrize(
    "dtype, levels, expected",
    [
        (np.uint16, [0, 257, 25700, 65535], [0, 1, 100, 255]),
        (np.uint16, [0, 9, 16383], [0, 0, 255]),
        (np.uint16, [0, 1606, 4015], [0, 100, 250]),  # 12 bits, as of a thermal camera
        (np.uint16, [0, 1023], [0, 255]),
        (np.uint16, [0, 7, 255], [0, 7, 255]),
        (np.uint16, [0, 0], [0, 0]),
        (np.int32, [0, 7, 255], [0, 7, 255]),
        (np.int32, [0, 25700, 65535], [0, 100, 255]),
        (np.int32, [-100000, 0, 100000], [0, 128, 255]),
        (np.float32, [-1.0, 0.6, 1.0], [0, 204, 255]),
        (np.float32, [0.2, 0.4], [51, 102]),
        (np.float32, [20.0, 25.0, 45.0], [0, 51, 255]),
        (np.float32, [np.nan, 0.6, 1.0], [0, 153, 255]),
        (np.float32, [np.inf, -np.inf, 1.0], [0, 0, 255]),
    ],
)
def test_more_than_8_bits_are_scaled_by_the_bits_that_the_levels_have(
    tmp_path, dtype, levels, expected
):
    for suffix in ("png", "tif") if dtype is np.uint16 else ("tif",):
        image = Image.fromarray(np.array([levels], dtype=dtype))
        path = _save(image, tmp_path / f"deep.{suffix}")
        np.testing.assert_array_equal(read_image(path)[..., 0], [expected])


def write_png(path, pixels, *chunks, after=()):
    """Pixels (H, W, 3) or (H, W) uint8 or uint16 as PNG, with chunks before and after them."""
    height, width = pixels.shape[:2]
    header = np.array([width, height], ">u4").tobytes()
    header += bytes([8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0, 0, 0, 0])
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    content = b"\x89PNG\r\n\x1a\n"
    data = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")]
    for kind, body in data:
        checksum = zlib.crc32(kind + body).to_bytes(4, "big")
        content += len(body).to_bytes(4, "big") + kind + body + checksum
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "levels, expected", [([0, 257, 65535], [0, 1, 255]), ([0, 2048, 4095], [0, 136, 255])]
)
def test_color_of_16_bits_is_scaled_by_the_bits_that_it_has(tmp_path, levels, expected):
    pixels = np.repeat(np.array([levels], dtype=np.uint16)[..., None], 3, axis=2)
    path = write_png(tmp_path / "deep.png", pixels)
    # Pillow gives the upper half of each level.
    np.testing.assert_allclose(read_image(path)[0, :, 1], expected, atol=16)
    assert read_image(path).max() >= 240


def test_that_levels_are_scaled_is_said_once(tmp_path, caplog):
    logger._LOG_COUNTER.clear()
    with caplog.at_level(logging.WARNING, "smca"):
        for n in (4000, 4001, 1000):
            levels = np.array([[0, n]], dtype=np.uint16)
            read_image(_save(Image.fromarray(levels), tmp_path / f"{n}.png"))
    first, second = caplog.messages
    assert "levels from 0 to 4095 (12 bits) are read as 0 to 255" in first
    assert "0 to 1023 (10 bits)" in second and "scale all files to 16 bits" in second


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_is_read_and_it_is_said(tmp_path, caplog, suffix):
    logger._LOG_COUNTER.clear()
    frames = [Image.new("RGB", (20, 12), color) for color in ("red", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    path = _save(frames[0], tmp_path / f"a.{suffix}", **options)
    with caplog.at_level(logging.WARNING, "smca"):
        red = [read_image(path)[0, 0].tolist() for _ in range(2)]
    assert np.allclose(red, [255, 0, 0], atol=4)
    (message,) = caplog.messages
    assert "Only the first frame or page" in message


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", ["iCCP", "zTXt", "iTXt"])
def test_a_png_with_a_large_profile_or_text_is_read(tmp_path, kind, where):
    large = zlib.compress(bytes(2**21))  # more than Pillow reads of itself
    heads = {"iCCP": b"name\0\0", "zTXt": b"Comment\0\0", "iTXt": b"Comment\0\1\0\0\0"}
    chunk = (kind.encode(), heads[kind] + large)
    before, after = ((chunk,), ()) if where == "before" else ((), (chunk,))
    path = write_png(tmp_path / "large.png", _rgb(), *before, after=after)
    np.testing.assert_array_equal(read_image(path), _rgb())
    check_image(path, 12, 20)


# What a camera stores so that the orientation's transformation gives the upright image again.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: np.rot90(upright, 2),
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "tif"])  # Pillow turns TIFFs itself
def test_exif_orientation_turns_the_image_unless_only_the_stored_size_fits(
    tmp_path, suffix, orientation
):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](_rgb())))
    path = _save(image, tmp_path / f"turned.{suffix}", exif=_exif(orientation))
    np.testing.assert_array_equal(read_image(path, 12, 20), _rgb())
    np.testing.assert_array_equal(read_image(path), _rgb())
    check_image(path, 12, 20)
    if orientation >= 5 and suffix == "png":
        np.testing.assert_array_equal(read_image(path, 20, 12), STORED[orientation](_rgb()))
        check_image(path, 20, 12)
        with pytest.raises(DatasetError, match="is 20 x 12 pixels .* say 20 x 13"):
            check_image(path, 13, 20)


@pytest.mark.parametrize("read", [read_image, check_image])
@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda path, patch: path.write_text("hello"), "is empty, no image .perhaps a pointer"),
        (lambda path, patch: path.unlink(), "does not exist: restore it"),
        (lambda path, patch: path.write_bytes(path.read_bytes()[:-300]), "cannot be decoded"),
        (lambda path, patch: Image.new("L", (20, 13)).save(path), "is 20 x 13 .* say 20 x 12"),
        (lambda path, patch: path.write_bytes(b""), "is empty, no image"),
        (
            lambda path, patch: patch.setattr(Image, "MAX_IMAGE_PIXELS", 100),
            "has more than 200 pixels, .*: cut it into tiles or make it smaller",
        ),
        (
            lambda path, patch: patch.setattr(mapper.PathManager, "open", _refuse),
            "cannot be opened .Permission denied.: replace it",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(png, monkeypatch, read, prepare, words):
    prepare(Path(png), monkeypatch)
    with pytest.raises(DatasetError, match=rf"image\.png {words}"):
        read(png, 12, 20)


def _refuse(path, mode):
    raise OSError(errno.EACCES, "Permission denied")


# Mapping


def test_without_augmentation_image_and_boxes_stay_as_they_are(png):
    record = _record(png, [(1, 2, 3, 4), (5, 0, 15, 12)])
    sample = DetrDatasetMapper(True, [])(record)
    assert record == _record(png, [(1, 2, 3, 4), (5, 0, 15, 12)])
    bgr = DetrDatasetMapper(False, [], image_format="BGR")(record)
    np.testing.assert_array_equal(bgr["image"], _rgb()[..., ::-1].transpose(2, 0, 1))
    assert sample["image"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["image"], _rgb().transpose(2, 0, 1))
    assert sample["instances"].image_size == (12, 20)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[1, 2, 4, 6], [5, 0, 20, 12]]
    assert sample["instances"].gt_classes.tolist() == [0, 1]
    assert (sample["image_id"], sample["height"], sample["width"]) == (7, 12, 20)
    assert "annotations" not in sample


@pytest.mark.parametrize(
    "settings",
    [
        {"short_sides": []},
        {"short_sides": [480, 0]},
        {"max_size": 0},
        {"crop_range": [60, 30]},
        {"crop_range": [0, 30]},
        {"color_jitter": 3},
    ],
)
def test_an_augmentation_out_of_range_is_named(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name}=.* must be "):
        detr_augmentations(**settings)


def test_boxes_follow_flip_crop_and_resize(tmp_path):
    # One bright rectangle: wherever the pixels go, the box must go too.
    image = np.zeros((100, 140, 3), dtype=np.uint8)
    image[30:70, 40:100] = 255
    path = _save(Image.fromarray(image), tmp_path / "rectangle.png")
    augmentations = detr_augmentations(
        (90, 150), 300, crop_range=(80, 130), crop_short_sides=(100, 120)
    )
    mapper = DetrDatasetMapper(True, augmentations)
    np.random.seed(0)
    for _ in range(20):
        sample = mapper(_record(path, [(40, 30, 60, 40)], height=100, width=140))
        bright = sample["image"][0] > 127
        ys, xs = torch.where(bright.any(1))[0], torch.where(bright.any(0))[0]
        expected = torch.stack([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]).float()
        torch.testing.assert_close(
            sample["instances"].gt_boxes.tensor[0], expected, atol=1.01, rtol=0
        )


def test_crowds_and_boxes_emptied_by_the_crop_are_dropped(png):
    crop_left_half = T.CropTransform(0, 0, 10, 12)
    boxes = [(-1, -2, 6, 7), (12, 0, 5, 5), (1, 1, 5, 5), (8, 2, 9, 4)]
    sample = DetrDatasetMapper(True, [crop_left_half])(_record(png, boxes, crowd={2}))
    assert sample["instances"].gt_classes.tolist() == [0, 3]
    assert sample["instances"].gt_boxes.tensor.tolist() == [[0, 0, 5, 5], [8, 2, 10, 6]]


def test_in_evaluation_there_are_no_instances_and_the_original_size_is_kept(png):
    mapper = DetrDatasetMapper(False, detr_augmentations(60, 1000, flip=False))
    sample = mapper(_record(png, [(1, 2, 3, 4)]))
    assert "instances" not in sample and "annotations" not in sample
    assert sample["image"].shape == (3, 60, 100)
    assert (sample["height"], sample["width"]) == (12, 20)
    assert mapper({"file_name": png})["width"] == 20  # as its file says


# Recipe


def test_crop_takes_its_range_of_the_first_resized_image():
    augmentations = detr_augmentations(crop_range=(384, 600))
    _, first_resize, crop, second_resize = augmentations
    assert first_resize.short_edge_length == [400, 500, 600]
    cropped = []
    np.random.seed(0)
    for _ in range(60):
        aug_input = T.AugInput(np.zeros((480, 640, 3), dtype=np.uint8))
        T.AugmentationList([first_resize, crop])(aug_input)
        cropped.append(aug_input.image.shape[:2])
    assert 384 <= min(map(min, cropped)) < 400 and 550 < max(map(max, cropped)) <= 600
    assert len({height for height, _ in cropped}) > 10 and len({width for _, width in cropped}) > 10
    assert second_resize.short_edge_length == list(range(480, 801, 32))
    assert second_resize.max_size == 1333


def test_each_branch_is_drawn_half_the_time_and_half_the_images_are_flipped(tmp_path):
    path = _save(Image.fromarray(_rgb(4, 6)), tmp_path / "small.png")
    flip = T.RandomFlip()
    mapper = DetrDatasetMapper(True, [flip], [flip, T.CropTransform(0, 0, 6, 2)])
    np.random.seed(0)
    samples = [mapper(_record(path, height=4, width=6)) for _ in range(400)]
    assert 160 < sum(s["image"].shape[1] == 2 for s in samples) < 240
    left_top = torch.from_numpy(_rgb(4, 6)[0, 0])
    assert 160 < sum(torch.equal(s["image"][:, 0, 0], left_top) for s in samples) < 240


def test_an_evaluation_takes_no_crops():
    with pytest.raises(ValueError, match="augmentations_with_crop is for training"):
        DetrDatasetMapper(False, [], detr_augmentations(crop_range=(48, 80)))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6000), (6000, 1), (20, 30)])
def test_images_smaller_than_the_crop_do_not_fail(tmp_path, height, width):
    path = _save(Image.fromarray(_rgb(height, width)), tmp_path / "odd.png")
    with_crop = detr_augmentations((64, 96), 128, crop_range=(48, 80), crop_short_sides=(50, 60))
    mapper = DetrDatasetMapper(True, detr_augmentations((64, 96), 128), with_crop)
    np.random.seed(0)
    for _ in range(6):
        record = _record(path, [(0, 0, width, height)], height=height, width=width)
        sample = mapper(record)
        assert 1 <= min(sample["image"].shape[1:]) <= max(sample["image"].shape[1:]) <= 128
        assert len(sample["instances"]) == 1
