import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from helpers import ROOT, child_environment, full_disk, write_tiny_config
from smca.data import DatasetError, build_train_loader, set_start_sample
from smca.errors import ConfigError, UserError

DATASET = [{"image_id": i} for i in range(10)]


def _draw_from_all_generators(record):
    """A mapper whose result shows the image and all the random states."""
    return record["image_id"], random.random(), np.random.rand(), torch.rand(()).item()


def _batches(count, dataset=DATASET, start=0, **options):
    options = {"mapper": _draw_from_all_generators, "total_batch_size": 4, **options}
    loader = build_train_loader(dataset, **options)
    set_start_sample(loader, start * options["total_batch_size"])
    return list(itertools.islice(loader, count))


def _image_ids(batches):
    return [sample[0] for batch in batches for sample in batch]


def _as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


@pytest.mark.parametrize("annotations", [[], [{"iscrowd": 1}]])
def test_data_without_objects_cannot_train(annotations):
    dataset = [{"image_id": 1, "annotations": annotations}]
    with pytest.raises(DatasetError, match="The training data have no objects"):
        _batches(1, dataset)
    dataset.append({"image_id": 2, "annotations": [{"iscrowd": 0}]})
    assert _batches(1, dataset)


def test_every_pass_sees_every_image_once_in_another_order():
    ids = _image_ids(_batches(5))  # two passes over ten images
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:] and ids[:10] != list(range(10))


def test_same_seed_gives_the_same_samples_and_another_seed_others():
    assert _batches(4, seed=3) == _batches(4, seed=3)
    assert _image_ids(_batches(3, seed=3)) != _image_ids(_batches(3, seed=4))


def test_the_seed_decides_the_augmentation_of_an_image_too():
    one, other = (_batches(1, dataset=DATASET[:1], seed=seed) for seed in (3, 4))
    assert _image_ids(one) == _image_ids(other) == [0] * 4
    assert len({sample[1:] for sample in one[0]}) == 4  # each pass has its own
    assert {sample[1:] for sample in one[0]}.isdisjoint(sample[1:] for sample in other[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_later_gives_the_batches_of_an_unbroken_run(num_workers):
    unbroken = _batches(9)
    assert _batches(4, start=5, num_workers=num_workers) == unbroken[5:]


def test_ranks_share_the_stream_without_overlap(monkeypatch):
    whole = _image_ids(_batches(5))
    per_rank = []
    for rank in range(2):
        _as_rank(monkeypatch, rank, 2)
        batches = _batches(5)
        assert all(len(batch) == 2 for batch in batches)
        per_rank.append(_image_ids(batches))
    assert whole == [i for pair in zip(*per_rank) for i in pair]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(num_workers):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = _draw_from_all_generators({"image_id": 0})
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    _batches(3, num_workers=num_workers)
    assert _draw_from_all_generators({"image_id": 0}) == expected


def test_batch_must_divide_among_the_processes(monkeypatch):
    _as_rank(monkeypatch, 0, 3)
    with pytest.raises(ConfigError, match="total_batch_size=4 .* multiple .* 3"):
        _batches(1)


def test_what_cannot_be_loaded_or_started_is_an_error():
    with pytest.raises(DatasetError, match="no images"):
        _batches(1, dataset=[])
    with pytest.raises(TypeError, match="build_train_loader"):
        set_start_sample(torch.utils.data.DataLoader(DATASET), 3)


# Shared memory


@pytest.mark.parametrize("has_room", [True, False])
def test_tensors_come_from_the_workers_whether_shared_memory_has_room_or_not(monkeypatch, has_room):
    def no_room(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    def mapper(record):
        image = torch.full((3, 200, 200), record["image_id"], dtype=torch.uint8)
        return {**record, "image": image, "box": torch.tensor([0.5])}

    if not has_room:
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    for batch in _batches(5, mapper=mapper, num_workers=2):
        for sample in batch:
            assert (sample["image"] == sample["image_id"]).all() and sample["box"].item() == 0.5
            assert sample["image"].is_shared() == has_room


def test_training_and_evaluation_work_with_a_small_dev_shm(tmp_path):
    mount = "mount -t tmpfs -o size=512k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting another /dev/shm is not allowed here")
    config = write_tiny_config(tmp_path)
    overrides = []
    for split in ("train", "test"):
        resize = "[{_target_: detectron2.data.transforms.Resize, shape: [400, 400]}]"
        overrides.append(f"dataloader.{split}.mapper.augmentations={resize}")
        overrides.append(f"dataloader.{split}.num_workers=2")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount + ' && exec "$@"', "sh"]
        + [sys.executable, str(ROOT / "train_net.py"), "--config-file", config, *overrides],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr


def test_a_full_dev_shm_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "Queue", full_disk)
    with pytest.raises(UserError, match=r"No space left.*--shm-size=1g.*train.num_workers=0"):
        _batches(1, num_workers=1)
    assert _batches(1, num_workers=0)
