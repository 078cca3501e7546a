"""DETR's training recipe in Detectron2's terms: learning rates of the parts, and their schedule."""

from typing import Any, Callable, Dict, Mapping, Tuple

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

COCO_TRAIN_IMAGES = 118287


def backbone_lr_factor(factor: float) -> Callable[[str], float]:
    """The backbone learns at `factor` times the learning rate of the rest, see
    :func:`layer_lr_factor`."""
    return layer_lr_factor({"backbone": factor})


def layer_lr_factor(factors: Mapping[str, float]) -> Callable[[str], float]:
    """Each part or layer learns at its own share of the learning rate.

    Args:
        factors: from the beginning of parameters' names, in whole words between dots
            ("backbone", "encoder.layers.0"), to their factor. The longest that fits counts; 1
            where none does.

    Returns:
        A function from a parameter's name to its factor, for
        ``get_default_optimizer_params(lr_factor_func=...)``.
    """
    by_length = sorted(factors.items(), key=lambda item: -len(item[0]))

    def lr_factor(parameter_name: str) -> float:
        fits = (f for prefix, f in by_length if f"{parameter_name}.".startswith(f"{prefix}."))
        return next(fits, 1.0)

    return lr_factor


def steps_of_epochs(epochs: float, num_images: int, batch_size: int, accumulate: int = 1) -> int:
    """Iterations, each of `accumulate` batches in all processes together, of so many epochs."""
    return max(1, round(epochs * num_images / (batch_size * accumulate)))


def step_schedule(
    epochs: int, drop_epoch: int, batch_size: int, num_images: int = COCO_TRAIN_IMAGES
) -> Tuple[int, Dict[str, Any]]:
    """``train.max_iter`` and ``lr_multiplier`` of a training of `epochs` whose rate is divided by
    10 after `drop_epoch` epochs. An iteration has `batch_size` images in all processes together.

    Raises:
        ValueError: there are fewer images than a batch has.
    """
    if num_images < batch_size:
        raise ValueError(f"num_images={num_images} are fewer than batch_size={batch_size}.")
    # The official loader drops an epoch's last, incomplete batch.
    iterations = num_images // batch_size
    max_iter, drop = epochs * iterations, drop_epoch * iterations
    # fvcore's scheduler looks a millionth of the training ahead, more than one iteration of a
    # long one.
    ahead = int(MultiStepParamScheduler.WHERE_EPSILON * max_iter)
    settings = dict(values=[1.0, 0.1], milestones=[drop + ahead], num_updates=max_iter)
    return max_iter, L(MultiStepParamScheduler)(**settings)
