"""A training loader whose stream of samples is a function of the seed and the position in it."""

import contextlib
import functools
import random
from multiprocessing.reduction import ForkingPickler
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from smca.errors import ConfigError, DatasetError, UserError

Mapper = Callable[[Dict[str, Any]], Dict[str, Any]]

_SHARED_SIZE = 2**16  # bytes from which a tensor goes through shared memory

# Keep the random numbers of the shuffling apart from those of the augmentation.
_SHUFFLE, _AUGMENT = 0, 1


class _EndlessBatches(Sampler[List[Tuple[int, int]]]):
    """Batches of (position, index) pairs from an endless stream.

    The stream is one pass over the `size` items of the data set after the other, each shuffled by
    (seed, pass). Positions count from its start. Rank r takes the positions r, r + world size, ...
    of each global batch, of which `batch_size` are its own.
    """

    def __init__(self, *, size: int, batch_size: int, seed: int, rank: int, world_size: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_sample = 0

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        position = self.start_sample + self.rank
        shuffled_epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            batch = []
            for _ in range(self.batch_size):
                epoch, offset = divmod(position, self.size)
                if epoch != shuffled_epoch:
                    rng = np.random.default_rng((self.seed, _SHUFFLE, epoch))
                    shuffled_epoch, order = epoch, rng.permutation(self.size)
                batch.append((position, int(order[offset])))
                position += self.world_size
            yield batch


class _SeededMapDataset(Dataset[Dict[str, Any]]):
    """Applies `mapper` with random numbers that depend on the position in the stream only, and
    leaves the states of `random`, `numpy.random` and `torch` on the CPU as they are."""

    def __init__(self, dataset: Sequence[Dict[str, Any]], mapper: Mapper, seed: int):
        self.dataset, self.mapper, self.seed = dataset, mapper, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position_and_index: Tuple[int, int]) -> Dict[str, Any]:
        position, index = position_and_index
        sequence = np.random.SeedSequence((self.seed, _AUGMENT, position))
        seed = int(sequence.generate_state(1)[0])
        python_state, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed resets GPUs as well
            try:
                return self.mapper(self.dataset[index])
            finally:
                random.setstate(python_state)
                np.random.set_state(numpy_state)


def build_train_loader(
    dataset: Sequence[Dict[str, Any]],
    *,
    mapper: Mapper,
    total_batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    **kwargs: Any,
) -> DataLoader:
    """An endless loader of training batches, which are lists of samples.

    Batch number n of a process depends, to the last bit, only on the seed, the rank, the number of
    processes and n: not on `num_workers`, nor on the sample it was started at (`set_start_sample`).
    All processes together see every image once a pass. The global random states are not touched.

    Args:
        dataset: in Detectron2's format. May be smaller than a batch.
        mapper: from a dataset dict to a sample. May draw from `random`, `numpy.random` and `torch`.
        total_batch_size: images of all processes together.
        num_workers: worker processes; 0 loads in this one.
        seed: not negative, the same in all processes.
        kwargs: passed to `torch.utils.data.DataLoader`, e.g. ``prefetch_factor``.
            ``pin_memory`` is True where there is a GPU.

    Raises:
        DatasetError: the data set is empty.
        ConfigError: the batch cannot be divided among the processes.
    """
    if len(dataset) == 0:
        raise DatasetError("The training data set has no images: check dataloader.train.dataset.")
    found = (item.get("annotations") for item in dataset)  # a mapper may find them elsewhere
    if all(items is not None and all(each.get("iscrowd") for each in items) for items in found):
        raise DatasetError(
            "The training data have no objects (crowds do not count): add their annotations to the "
            "files of dataloader.train.dataset, such as data.train_json."
        )
    world_size = comm.get_world_size()
    if (
        not isinstance(total_batch_size, int)
        or total_batch_size < 1
        or total_batch_size % world_size
    ):
        raise ConfigError(
            f"total_batch_size={total_batch_size} must be a positive multiple of the number of "
            f"processes, {world_size}: change dataloader.train.total_batch_size."
        )
    if isinstance(dataset, list):
        # Serialized into one buffer, which forked workers share without copying it.
        dataset = DatasetFromList(dataset, copy=False)
    batches = _EndlessBatches(
        size=len(dataset),
        batch_size=total_batch_size // world_size,
        seed=seed,
        rank=comm.get_rank(),
        world_size=world_size,
    )
    # From other memory, images would be copied to a GPU in two steps.
    kwargs.setdefault("pin_memory", torch.cuda.is_available())
    loader = DataLoader(
        _SeededMapDataset(dataset, mapper, seed),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        # Without one of its own, the loader would draw from torch's global generator.
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )
    spare_shared_memory(loader)
    return loader


def spare_shared_memory(loader: DataLoader) -> None:
    """Let the workers of a loader send through a pipe what finds no room in /dev/shm.

    PyTorch's workers hand every tensor over in shared memory. Where that is full (Docker gives a
    container 64 MB), a batch is lost, and the loader waits for it for ever.
    """
    if loader.num_workers:
        try:
            [torch.multiprocessing.Queue() for _ in range(loader.num_workers + 2)]
        except OSError as error:
            raise UserError(
                f"Loader processes cannot start, since /dev/shm has no room ({error.strerror}): "
                "empty it, give a container more (docker run --shm-size=1g), or load images in the "
                "main process with dataloader.train.num_workers=0 dataloader.test.num_workers=0."
            ) from error
    loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn)


def _init_worker(others: Optional[Callable[[int], None]], worker_id: int) -> None:
    if others is not None:
        others(worker_id)
    ForkingPickler.register(torch.Tensor, _reduce_tensor)  # in place of PyTorch's


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """How to pickle a tensor: large ones go through shared memory if there is room, all others by
    value."""
    if tensor.device.type != "cpu":
        return reduce_tensor(tensor)
    if tensor.untyped_storage().nbytes() >= _SHARED_SIZE:
        with contextlib.suppress(RuntimeError):
            tensor.share_memory_()
            return reduce_tensor(tensor)
    return torch.from_numpy, (tensor.numpy(),)


def set_start_sample(loader: DataLoader, num_samples: int) -> None:
    """Make the next ``iter()`` of a loader of `build_train_loader` begin after so many samples of
    all processes together, in batches of whatever size. Another loader is a TypeError."""
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, _EndlessBatches):
        raise TypeError(
            f"A {type(loader).__name__} cannot start in the middle of its data: build "
            "dataloader.train with smca.data.build_train_loader."
        )
    sampler.start_sample = num_samples
