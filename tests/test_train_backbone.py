import logging

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog

import train_backbone
from helpers import ROOT
from smca.checkpoint import SMCACheckpointer
from smca.config import load_config

CONFIG = str(ROOT / "configs" / "convergence" / "pretrained_multi_scale.py")


def test_a_trained_backbone_is_where_a_detector_starts(tmp_path, capsys, caplog):
    file = tmp_path / "new" / "backbone.pth"
    arguments = [CONFIG, "--output", str(file), "--images", "30", "--steps", "2"]
    assert train_backbone.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Written: {file}"
    assert lines[-2].endswith("objects are told apart.")
    model = instantiate(load_config(CONFIG).model)
    with caplog.at_level(logging.INFO, logger="smca"):
        SMCACheckpointer(model).load(str(file))
    count = len(model.backbone.state_dict())
    assert f"{count} of the backbone's {count} weights are in {file}" in caplog.text
    # All of it was trained, the stem too, which detectors freeze.
    torch.manual_seed(1000)
    fresh = instantiate(load_config(CONFIG, ["model.backbone.freeze_at=0"]).model.backbone)
    for (name, trained), start in zip(model.backbone.named_parameters(), fresh.parameters()):
        assert not torch.equal(trained, start), name


def test_pictures_show_each_object_with_what_is_around_it(tmp_path):
    names = train_backbone.register_shapes(3, 2, seed=7, prefix="backbone", lengths=(12, 120))
    records = DatasetCatalog.get(names[0])
    pictures = train_backbone.ObjectPictures(names[0], augment=False)
    objects = [(each, record) for record in records for each in record["annotations"]]
    assert len(pictures) == len(objects) > 3
    for (image, label), (annotation, record) in zip(pictures, objects):
        assert label == annotation["category_id"]
        assert image.shape == (3, train_backbone.SIDE, train_backbone.SIDE)
        # The middle is the object's: its color there is the picture's own.
        x, y, width, height = annotation["bbox"]
        original = train_backbone.Image.open(record["file_name"]).convert("RGB")
        x, y, reach = x + width / 2, y + height / 2, max(width, height) * 0.1
        center = original.crop((x - reach, y - reach, x + reach + 1, y + reach + 1))
        expected = train_backbone.v2.functional.pil_to_tensor(center).float().mean(dim=(1, 2))
        middle = image[:, 28:36, 28:36].mean(dim=(1, 2))
        torch.testing.assert_close(middle, expected, atol=25, rtol=0)
