"""Damaged annotation files, images, configs and checkpoints.

Whatever the damage, either there is one error for the user, which names the file or the key, or the
input is used for what it says. Many more inputs, which Hypothesis draws anew with each seed:

    FUZZ_EXAMPLES=420 python -m pytest tests/test_fuzz.py -o timeout=0 --hypothesis-seed=7
"""

import copy
import io
import json
import logging
import os
import warnings
import zipfile

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from convert_checkpoint import read_state_dict
from smca.config import build, get_config, get_config_file, load_config
from smca.config.lazy import _all_keys
from smca.data import DetrDatasetMapper, register_coco
from smca.errors import CheckpointError, UserError
from smca.inference import Predictor

pytestmark = pytest.mark.filterwarnings("ignore")
damage = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 20)),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),  # the folder is the same for all examples of a test
    phases=[Phase.generate, Phase.shrink],
)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


# ---- Damage

_TEXTS = st.sampled_from(["", "0.png", "1", "a", "../0.png", "\0", "\udc80", "é", "x" * 300])
_NUMBERS = st.integers(-2, 12) | st.sampled_from(
    [10**30, -(2**63), 0.5, -0.0, 1e-30, 1e30, float("nan"), float("inf")]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=5,
)


def entries(node):
    """Each container inside JSON-like data, with each of its keys."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys if isinstance(node, (dict, list)) else ():
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from entries(node[key])


@st.composite
def damaged(draw, original, values=_VALUES):
    """JSON-like data with one to three entries replaced, removed or repeated."""
    result = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        found = list(entries(result))
        if not found:
            break
        node, key = found[draw(st.integers(0, len(found) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if action == "replace":
            node[key] = draw(values)
        elif action == "remove":
            del node[key]
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[draw(st.sampled_from(list(node)))] = copy.deepcopy(node[key])
    return result


@st.composite
def damaged_bytes(draw, originals):
    """One of the files, cut off, with a piece cut out, doubled, or with other bytes."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 16, 64, len(data)]))
        others = draw(st.binary(min_size=1, max_size=8))
        tails = [b"", data[start + length :], data[start : start + length] + data[start:]]
        data = data[:start] + draw(st.sampled_from([*tails, others + data[start + len(others) :]]))
    return data


def refused(error, *names):
    """False, for "not accepted"; the message has to contain one of the names."""
    message = str(error)
    assert message.strip() and "Traceback" not in message, message
    assert any(str(name) in message for name in names), f"{message!r} names none of {names}"
    return False


# ---- Annotation files

COCO = {
    "images": [
        {"id": 1, "file_name": "0.png", "height": 8, "width": 10},
        {"id": 2, "file_name": "1.png", "height": 6, "width": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 5], "area": 20, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 7, "bbox": [0, 0, 2.5, 3], "area": 7, "iscrowd": 1},
        {"id": 3, "image_id": 2, "category_id": 7, "bbox": [2, 2, 3, 3], "area": 9, "iscrowd": 0}
        | {"segmentation": [[2, 2, 5, 2, 5, 5]]},
    ],
    "categories": [{"id": 7, "name": "round"}, {"id": 3, "name": "square"}],
}


def number(value):
    """Of a text that is one, such as "1"; other values as they are."""
    try:
        return float(value)
    except ValueError:
        return value


def check_coco(folder, text, check_images):
    """Registered and read, a file gives the boxes and classes that it holds, in every image."""
    images, path = folder / "images", folder / "truth.json"
    images.mkdir(exist_ok=True)
    for image in COCO["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(images / image["file_name"])
    path.write_bytes(text)
    try:
        name = register_coco(path, images, check_images=check_images)
    except UserError as error:
        return refused(error, path)
    records, data = DatasetCatalog.pop(name)(), json.loads(text)
    classes = MetadataCatalog.pop(name).thing_classes
    found = [
        (os.path.basename(record["file_name"]), classes[a["category_id"]], a["bbox"], a["iscrowd"])
        for record in records
        for a in record["annotations"]
    ]
    files = {number(image["id"]): image["file_name"] for image in data["images"]}
    names = {number(category["id"]): category["name"] for category in data["categories"]}
    wanted = [
        (
            os.path.basename(files[number(a["image_id"])]),
            names[number(a["category_id"])],
            [number(value) for value in a["bbox"]],
            a.get("iscrowd") or 0,
        )
        for a in data["annotations"]
    ]
    assert sorted(found) == sorted(wanted)
    assert len(records) == len(data["images"])
    mapper = DetrDatasetMapper(is_train=True, augmentations=[])
    for record in records:
        try:
            mapper(record)
        except UserError as error:
            assert not check_images, f"found too late: {error}"
            return refused(error, record["file_name"])
    return True


_WHOLE = json.dumps(COCO).encode()
_DAMAGED = damaged(COCO).map(lambda data: json.dumps(data).encode()) | damaged_bytes([_WHOLE])


@damage
@given(_DAMAGED, st.booleans())
def test_annotations(tmp_path, text, check_images):
    check_coco(tmp_path, text, check_images)


# ---- Configs

SMALL = ["model.backbone.depth=18", "model.embed_dim=16", "model.encoder.ffn_dim=16"]
SMALL += ["model.decoder.ffn_dim=16", "model.encoder.num_heads=2", "model.decoder.num_heads=2"]

_KEYS = st.deferred(lambda: st.sampled_from(list(_all_keys(get_config("smca_r50_50ep"))))).filter(
    lambda key: "_target_" not in key
)
_WRONG_KEYS = st.tuples(
    _KEYS, st.integers(0, 30), st.sampled_from(["", "x", ".", "[", "é", "=", "0"])
).map(lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + 1 :])
_OVERRIDES = st.tuples(
    _KEYS | _KEYS.filter(lambda key: key.startswith("model.")) | _WRONG_KEYS | st.text(max_size=5),
    st.integers(-2, 20).map(str)
    | st.sampled_from(["1e30", "0.5", "-0.1", "nan", "inf", "true", "null", "''", "a", "'a b'"])
    | st.sampled_from(["[]", "[1]", "[1,2]", "[a]", "{}", "{a:1}", "[[1]]", "{num_layers:2}"])
    | st.sampled_from(["${model.embed_dim}", "${no.key}", "${", "[", "a b", "=", '"', "é"])
    | st.sampled_from(["cuda", "mps", "meta", "bf16", "IM", "single", "multi_head", "r50.pth"])
    | st.text(max_size=4),
)


def check_overrides(*overrides):
    """What is built of a config with overrides can be, or the error names one of their keys."""
    texts = [f"{key}={value}" for key, value in overrides]
    names = ["model", *(key for key, _ in overrides), *texts, *map(repr, texts)]
    try:
        cfg = load_config(get_config_file("smca_r50_50ep"), [*SMALL, *texts])
    except UserError as error:
        return refused(error, *names, "from what it refers to", "_target_")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(cfg.model)
        build(cfg.lr_multiplier)
        build(cfg.dataloader.train.mapper)
        build(cfg.dataloader.test.mapper)
    except UserError as error:
        return refused(error, "model", "lr_multiplier", "dataloader")
    return True


@damage
@example([(":\x1f", "\x80")])
@given(st.lists(_OVERRIDES, min_size=1, max_size=2))
def test_overrides(overrides):
    check_overrides(*overrides)


def small_yaml():
    train = OmegaConf.to_container(get_config("smca_r50_50ep").train) | {"device": "cpu"}
    linear = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}
    mapper = {"image_format": "RGB", "augmentations": []}
    test = {"dataset": {"names": "fuzz_test"}, "mapper": mapper}
    sections = dict(model=linear, dataloader={"test": test}, optimizer={}, lr_multiplier={})
    return OmegaConf.to_yaml({**sections, "train": train})


# ---- Checkpoints

_TENSORS = st.sampled_from(
    [torch.zeros(size) for size in ((2, 3), (3, 3), ())]
    + [torch.zeros(2, dtype=torch.long), torch.full((2,), float("nan"))]
    + [torch.zeros(2, 3).to_sparse(), nn.Parameter(torch.ones(2))]
)


def checkpoint():
    torch.manual_seed(0)
    about = {"config": "tiny.py", "overrides": ["a=1"], "num_classes": 2, "version": "1"}
    return {
        "model": dict(nn.Linear(3, 2).state_dict()),
        "trainer": {"iteration": 3, "seed": 1},
        "iteration": 3,
        "smca": {**about, "class_names": ["round", "square"]},
    }


def saved(data, **kwargs):
    file = io.BytesIO()
    torch.save(data, file, **kwargs)
    return file.getvalue()


def check_checkpoint(folder, data):
    """What is loaded are the weights that were saved, or those that were put in their place."""
    path = folder / "model.pth"
    path.write_bytes(data)
    (folder / "tiny.yaml").write_text(small_yaml())
    try:
        Predictor(str(path))
    except UserError as error:
        refused(error, path)
    try:
        predictor = Predictor(str(path), config_file=str(folder / "tiny.yaml"))
    except UserError as error:
        return refused(error, path)
    assert all(isinstance(name, str) for name in predictor.class_names)
    if zipfile.is_zipfile(path):  # what the file's own sums say is whole
        assert zipfile.ZipFile(path).testzip() is None, "damaged data were loaded"
    stored = torch.load(path, weights_only=True)
    stored = stored.get("model", stored)
    for name, weight in predictor.model.state_dict().items():
        wanted = torch.as_tensor(stored[name]).to(weight.dtype)
        assert torch.equal(weight.nan_to_num(), wanted.nan_to_num()), name
    return True


@damage
@given(
    damaged(checkpoint(), _VALUES | _TENSORS).map(saved)
    | damaged_bytes(
        [saved(checkpoint()), saved(checkpoint(), _use_new_zipfile_serialization=False)]
    )
)
def test_checkpoints(tmp_path, data):
    check_checkpoint(tmp_path, data)


# ---- No damage, and the least damage that once did harm


def test_input_without_damage_is_accepted(tmp_path):
    assert check_coco(tmp_path, _WHOLE, True)
    assert check_overrides(("model.num_queries", "7"))
    assert check_checkpoint(tmp_path, saved(checkpoint()))


@pytest.mark.parametrize(
    "key, value",
    [
        ("dataloader", "${model.embed_dim}"),
        ("dataloader.test.dataset", "null"),
        ("train.compile", "${no.key}"),
        ("model._target_", "${no.key}"),
        ("model._target_", "no.such.module"),
    ],
)
def test_an_override_of_the_wrong_type(key, value):
    # The second one looks for the names that a target takes.
    assert not check_overrides((key, value), ("model.backbone", "0"))


def test_a_flipped_bit_of_a_weight(tmp_path):
    data = bytearray(saved(checkpoint()))
    data[data.index(checkpoint()["model"]["weight"].numpy().tobytes())] ^= 1
    assert not check_checkpoint(tmp_path, bytes(data))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state_dict(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("model", [{}, None, [], torch.zeros(2, 3)], ids=str)
def test_a_checkpoint_of_another_structure(model, tmp_path):
    assert not check_checkpoint(tmp_path, saved({**checkpoint(), "model": model}))


@pytest.mark.parametrize(
    "about",
    [7, {"config": torch.zeros(2, 3)}, {"config": 5}, {"overrides": 7}, {"class_names": 5}]
    + [{"class_names": ["a", 1]}],
    ids=str,
)
def test_a_checkpoint_that_says_strange_things_about_itself(about, tmp_path):
    if isinstance(about, dict):
        about = {**checkpoint()["smca"], **about}
    assert check_checkpoint(tmp_path, saved({**checkpoint(), "smca": about}))
