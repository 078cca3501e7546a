#!/usr/bin/env python3
"""Bad input at scale: random damage to annotation files, images, configs and checkpoints.

    python dev/fuzz.py --examples 500            # of each kind
    python dev/fuzz.py --examples 5000 --kind checkpoint --seed 1

Whatever the damage, either there is one error for the user, which names the file or the key, or
the input is used for what it says, which is checked by other means. The first input for which
neither is true is reduced to a small one and printed, and the exit code is 1.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from smca.config import build, get_config, get_config_file, load_config
from smca.data import DetrDatasetMapper, read_image, register_coco
from smca.data.mapper import check_image
from smca.errors import UserError, exit_code
from smca.inference import Predictor

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

__all__ = ["COCO", "KINDS", "checkpoint", "image_files", "run", "saved", "small_yaml"]

Check = Callable[[Path, Any], bool]

# ---- Damage

_NUMBERS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([10**30, -(2**63), 0.5, -0.0, 1e-30, 1e30, float("nan"), float("inf")]),
)
_TEXTS = st.sampled_from(["", "0.png", "1", "a", "../0.png", "\0", "\udc80", "é", "x" * 300])
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def damaged(draw: Any, original: Any, values: Any = _VALUES) -> Any:
    """The structure of dicts and lists with one to three entries replaced, removed, repeated or
    added."""
    result = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        node = result
        while True:
            entries = _entries(node)
            if not entries:
                break
            key = draw(st.sampled_from(entries))
            if _entries(node[key]) and draw(st.integers(0, 4)):
                node = node[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
            if action == "replace":
                node[key] = draw(values)
            elif action == "remove":
                del node[key]
            elif isinstance(node, list):
                node.insert(draw(st.integers(0, len(node))), copy.deepcopy(node[key]))
            else:
                node[draw(st.sampled_from(entries))] = copy.deepcopy(node[key])
            break
    return result


def _entries(node: Any) -> List[Any]:
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


@st.composite
def damaged_bytes(draw: Any, originals: List[bytes]) -> bytes:
    """One of the files, cut off, with a piece cut out, doubled, or with other bytes."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 16, 64, len(data)]))
        action = draw(st.sampled_from(["cut off", "cut out", "double", "overwrite"]))
        if action == "cut off":
            data = data[:start]
        elif action == "cut out":
            data = data[:start] + data[start + length :]
        elif action == "double":
            data = data[: start + length] + data[start:]
        else:
            others = draw(st.binary(min_size=1, max_size=8))
            data = data[:start] + others + data[start + len(others) :]
    return data


def _refused(error: UserError, *names: Any) -> bool:
    """False, for "not accepted"; the message has to contain one of the names."""
    message = str(error)
    assert message.strip(), "an empty message"
    assert "Traceback" not in message, message
    assert any(str(name) in message for name in names), f"{message!r} names none of {names}"
    return False


# ---- Annotation files

_CLASSES = [{"id": 7, "name": "round"}, {"id": 3, "name": "square"}]
COCO: Dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "0.png", "height": 8, "width": 10},
        {"id": 2, "file_name": "1.png", "height": 6, "width": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 5], "area": 20, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [0, 0, 2.5, 3], "area": 7, "iscrowd": 1},
        {
            "id": 3,
            "image_id": 2,
            "category_id": 7,
            "bbox": [2, 2, 3, 3],
            "area": 9,
            "iscrowd": 0,
            "segmentation": [[2, 2, 5, 2, 5, 5]],
        },
    ],
    "categories": _CLASSES,
}

_coco_inputs = st.tuples(
    st.one_of(
        damaged(COCO).map(lambda data: json.dumps(data).encode()),
        damaged_bytes([json.dumps(COCO).encode()]),
    ),
    st.booleans(),
)


def check_coco(folder: Path, value: Tuple[bytes, bool]) -> bool:
    """Registered and read, a file gives the boxes and classes that it holds, in every image."""
    text, check_images = value
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for index, image in enumerate(COCO["images"]):
            Image.new("RGB", (image["width"], image["height"])).save(images / f"{index}.png")
    path = folder / "truth.json"
    path.write_bytes(text)
    os.environ["SMCA_CACHE"] = str(folder / "cache")
    try:
        name = register_coco(path, images, name="fuzz", check_images=check_images)
    except UserError as error:
        return _refused(error, path)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            records = DatasetCatalog.get(name)
        _compare_records(json.loads(text), records, MetadataCatalog.get(name).thing_classes)
        mapper = DetrDatasetMapper(is_train=True, augmentations=[])
        for record in records:
            try:
                mapper(record)
            except UserError as error:
                assert not check_images, f"found too late: {error}"
                return _refused(error, record["file_name"])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_coco.__globals__["_registered"].pop(name)
    return True


def _compare_records(data: Any, records: List[Any], classes: List[str]) -> None:
    categories = sorted(data["categories"], key=lambda category: category["id"])
    assert classes == [category["name"] for category in categories]
    index = {category["id"]: i for i, category in enumerate(categories)}
    assert len(records) == len(data["images"])
    by_id = {record["image_id"]: record for record in records}
    for image in data["images"]:
        record = by_id[image["id"]]
        assert os.path.basename(record["file_name"]) == os.path.basename(image["file_name"])
        found = [(a["category_id"], a["bbox"], bool(a["iscrowd"])) for a in record["annotations"]]
        wanted = [
            (index[a["category_id"]], a["bbox"], bool(a.get("iscrowd")))
            for a in data["annotations"]
            if a["image_id"] == image["id"]
        ]
        assert sorted(found) == sorted(wanted), f"{found} are not {wanted}"


# ---- Images

_SIZE = (12, 16)  # height, width


def image_files() -> List[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (*_SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    gray16 = Image.fromarray((pixels[..., 0].astype(np.uint16) * 257))
    exif = Image.Exif()
    exif[274] = 6
    files = []
    kinds: List[Tuple[Image.Image, Dict[str, Any]]] = [
        (image, dict(format="PNG")),
        (image, dict(format="JPEG")),
        (image.transpose(Image.Transpose.ROTATE_90), dict(format="JPEG", exif=exif)),
        (image, dict(format="JPEG", progressive=True)),
        (image, dict(format="GIF")),
        (image, dict(format="BMP")),
        (image, dict(format="TIFF", compression="tiff_lzw")),
        (image.transpose(Image.Transpose.ROTATE_90), dict(format="TIFF", exif=exif)),
        (image, dict(format="WEBP")),
        (gray16, dict(format="PNG")),
        (image.convert("P"), dict(format="PNG", transparency=0)),
    ]
    for picture, kwargs in kinds:
        file = io.BytesIO()
        picture.save(file, **kwargs)
        files.append(file.getvalue())
    return files


def check_image_file(folder: Path, data: bytes) -> bool:
    """What the check before the training accepts can be read, with the size that was asked for."""
    path = folder / "picture.png"
    path.write_bytes(data)
    try:
        check_image(path, *_SIZE)
    except UserError as error:
        with contextlib.suppress(UserError):
            read_image(path, *_SIZE)
        return _refused(error, path)
    image = read_image(path, *_SIZE)
    assert image.shape == (*_SIZE, 3) and image.dtype == np.uint8
    return True


# ---- Configs

_SMALL = ["model.backbone.depth=18", "model.embed_dim=16", "model.encoder.ffn_dim=16"]
_SMALL += ["model.decoder.ffn_dim=16", "model.encoder.num_heads=2", "model.decoder.num_heads=2"]


def _keys(node: Any, prefix: str = "") -> List[str]:
    keys = []
    for name in node.keys():
        keys.append(f"{prefix}{name}")
        value = None if OmegaConf.is_interpolation(node, name) else node._get_node(name)
        if isinstance(value, DictConfig):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


_override_values = st.one_of(
    st.integers(-2, 20).map(str),
    st.sampled_from(["1e30", "0.5", "-0.1", "nan", "inf", "true", "null", "''", "a", "'a b'"]),
    st.sampled_from(["[]", "[1]", "[1,2]", "[a]", "{}", "{a:1}", "[[1]]", "{num_layers:2}"]),
    st.sampled_from(["${model.embed_dim}", "${no.key}", "${", "[", "a b", "=", '"', "é"]),
    st.sampled_from(["cuda", "mps", "meta", "bf16", "IM", "single", "multi_head", "r50.pth"]),
    st.text(max_size=4),
)


def _override_keys() -> Any:
    keys = _keys(get_config("smca_r50_50ep"))
    known = st.sampled_from([key for key in keys if "_target_" not in key])
    near = st.tuples(known, st.integers(0, 30), st.sampled_from(["", "x", ".", "[", "é", "=", "0"]))
    wrong = near.map(lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + 1 :])
    model = st.sampled_from([key for key in keys if key.startswith("model.")])
    return st.one_of(known, model, wrong, st.text(max_size=5))


def check_overrides(folder: Path, value: List[Tuple[str, str]]) -> bool:
    """Overrides are in the config that results, and what is built of it can be, or the error names
    one of their keys."""
    texts = [f"{key}={override}" for key, override in value]
    sections = ["model", *(key for key, _ in value), *texts]
    try:
        cfg = load_config(get_config_file("smca_r50_50ep"), [*_SMALL, *texts])
    except UserError as error:
        return _refused(error, *map(repr, texts), *sections, "from what it refers to", "_target_")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_override_values(cfg, texts)
        try:
            with torch.device("meta"):
                build(cfg.model, "model")
            build(cfg.lr_multiplier, "lr_multiplier")
            build(cfg.dataloader.train.mapper, "dataloader.train.mapper")
            build(cfg.dataloader.test.mapper, "dataloader.test.mapper")
        except UserError as error:
            return _refused(error, "model", "lr_multiplier", "dataloader")
    return True


def _check_override_values(cfg: DictConfig, texts: List[str]) -> None:
    for index, text in enumerate(texts):
        override = OverridesParser.create().parse_override(text)
        expected, key = override.value(), override.key_or_group
        later = [other.split("=")[0].lstrip("+") for other in texts[index + 1 :]]
        if any(key.startswith(other) or other.startswith(key) for other in later):
            continue
        if "${" in text or isinstance(expected, dict):
            continue
        found = OmegaConf.select(cfg, key)
        found = OmegaConf.to_object(found) if OmegaConf.is_config(found) else found
        same = found == expected or (expected != expected and found != found)
        assert same, f"{text}: it is {found!r}"


_YAML = """\
model: {_target_: torch.nn.Linear, in_features: 3, out_features: 2}
dataloader:
  test:
    dataset: {names: fuzz_test}
    mapper: {image_format: RGB, augmentations: []}
optimizer: {}
lr_multiplier: {}
"""


def small_yaml() -> str:
    train = OmegaConf.to_yaml(get_config("smca_r50_50ep").train, sort_keys=False)
    indented = "".join(f"  {line}\n" for line in train.splitlines())
    return _YAML + "train:\n" + indented.replace("device: auto", "device: cpu")


def check_config_file(folder: Path, data: bytes) -> bool:
    """A damaged config.yaml."""
    path = folder / "config.yaml"
    path.write_bytes(data)
    try:
        cfg = load_config(str(path))
    except UserError as error:
        return _refused(error, path, "train", "dataloader", "from what it refers to")
    with contextlib.suppress(UserError):
        build(cfg.model, "model")
    return True


# ---- Checkpoints


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


_TENSORS = st.sampled_from(
    [
        torch.zeros(2, 3),
        torch.zeros(3, 3),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(()),
        torch.full((2,), float("nan")),
        torch.zeros(2, 3).to_sparse(),
        nn.Parameter(torch.ones(2)),
    ]
)


def checkpoint() -> Dict[str, Any]:
    return {
        "model": dict(_linear().state_dict()),
        "trainer": {"iteration": 3, "seed": 1},
        "iteration": 3,
        "smca": {
            "config": "tiny.py",
            "overrides": ["a=1"],
            "class_names": ["round", "square"],
            "num_classes": 2,
            "version": "1",
        },
    }


def saved(data: Any, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    torch.save(data, file, **kwargs)
    return file.getvalue()


_checkpoint_inputs = st.one_of(
    damaged(checkpoint(), st.one_of(_VALUES, _TENSORS)).map(saved),
    damaged_bytes([saved(checkpoint()), saved(checkpoint(), _use_new_zipfile_serialization=False)]),
)


def check_checkpoint(folder: Path, data: bytes) -> bool:
    """What is loaded are the weights that were saved, or those that were put in their place."""
    path = folder / "model.pth"
    path.write_bytes(data)
    (folder / "tiny.yaml").write_text(small_yaml())
    (folder / "config.yaml").unlink(missing_ok=True)
    try:
        Predictor(str(path))
    except UserError as error:
        _refused(error, path)
    try:
        predictor = Predictor(str(path), config_file=str(folder / "tiny.yaml"))
    except UserError as error:
        return _refused(error, path)
    assert all(isinstance(name, str) for name in predictor.class_names)
    # What the file's own sums say is whole.
    if zipfile.is_zipfile(path):
        assert zipfile.ZipFile(path).testzip() is None, "damaged data were loaded"
    stored = torch.load(path, weights_only=True)
    stored = stored.get("model", stored)
    for name, weight in predictor.model.state_dict().items():
        wanted = torch.as_tensor(stored[name]).to(weight.dtype)
        assert torch.equal(weight.nan_to_num(), wanted.nan_to_num()), name
    return True


KINDS: Dict[str, Tuple[Any, Check]] = {
    "coco": (_coco_inputs, check_coco),
    "image": (damaged_bytes(image_files()), check_image_file),
    "overrides": (
        st.lists(st.tuples(_override_keys(), _override_values), min_size=1, max_size=2),
        check_overrides,
    ),
    "config": (damaged_bytes([small_yaml().encode()]), check_config_file),
    "checkpoint": (_checkpoint_inputs, check_checkpoint),
}


def run(kind: str, folder: Path, examples: int, start: Optional[int] = None) -> collections.Counter:
    """Try inputs of one kind.

    Args:
        kind: one of `KINDS`.
        folder: to write them into.
        examples: how many.
        start: of the random numbers; None: always the same ones.

    Returns:
        How many were "accepted" and how many "refused".

    Raises:
        Exception: what the smallest bad input that was found raises, after printing it.
    """
    inputs, check = KINDS[kind]
    counts: collections.Counter = collections.Counter()

    def one(value: Any) -> None:
        counts["accepted" if check(folder, value) else "refused"] += 1

    test = settings(
        max_examples=examples,
        derandomize=start is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )(given(inputs)(one))
    (test if start is None else seed(start)(test))()
    return counts


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--examples", type=int, default=500, help="of each kind")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.disable()
    warnings.simplefilter("ignore")
    failed = False
    for kind in args.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts = run(kind, Path(folder), args.examples, args.seed)
                print(f"{kind}: {dict(counts)}", flush=True)
            except Exception:
                traceback.print_exc()
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(exit_code(main))
