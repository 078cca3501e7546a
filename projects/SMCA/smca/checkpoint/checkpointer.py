import logging
import os
import zipfile

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager

from smca.errors import CheckpointError
from smca.version import __version__

__all__ = ["SMCACheckpointer"]

logger = logging.getLogger(__name__)

_BACKBONE = "backbone."
# Above this share of its weights, a file is taken for the same backbone's. Published files lack
# a few (the norms that Swin has before its outputs) and have a few more (the classifier).
_SAME_BACKBONE = 0.9


class SMCACheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer for a detector with a ``backbone``, which loads a checkpoint whole
    or not at all.

    A file fits if it has exactly the detector's weights, or if it is a backbone's: none but the
    backbone's weights are found in it, with the prefix ``backbone.``, Detectron2's
    ``backbone.bottom_up.``, or without one (``detectron2://ImageNetPretrained/...``).

    It also writes where a checkpoint comes from under the key ``smca``.
    """

    def __init__(self, model, save_dir="", *, need_detector=False, provenance=None, **kwargs):
        """
        Args:
            model (nn.Module): may be wrapped in DistributedDataParallel.
            save_dir (str): where checkpoints are written.
            need_detector (bool): a backbone's file is an error in :meth:`load`.
            provenance (dict or None): plain values to keep in the checkpoints, for instance
                the config's name and the class names.
            kwargs: see :class:`detectron2.checkpoint.DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.need_detector = need_detector
        self.provenance = {**(provenance or {}), "version": __version__}

    def save(self, name, **kwargs):
        super().save(name, smca=self.provenance, **kwargs)

    def load(self, path, *args, **kwargs):
        """
        Same as in Detectron2.

        Raises:
            CheckpointError: the file cannot be found or read, or does not fit the model.
        """
        if not path:
            return super().load(path, *args, **kwargs)
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"The checkpoint {path} does not exist.") from error
        except (OSError, AssertionError) as error:
            raise CheckpointError(_unreachable_message(path)) from error
        except Exception as error:  # other structures, and damaged ones, raise nearly every type
            raise CheckpointError(
                f"The checkpoint {path} cannot be read, perhaps it was cut short or is of "
                f"another kind: {_first_line(error)}"
            ) from error
        finally:
            self._parsed_url_during_load = None  # which Detectron2 leaves set after an error

    def resume(self):
        """
        Load the newest checkpoint in `save_dir` with everything in it; it must be a detector's.

        Returns:
            dict: what no checkpointable object took.
        """
        self.need_detector = True
        return self.load(self.get_checkpoint_file())

    def _load_file(self, filename):
        # PyTorch does not look at the sums that it writes: a flipped bit would be a wrong weight.
        if zipfile.is_zipfile(filename):
            with zipfile.ZipFile(filename) as file:
                damaged = file.testzip()
            if damaged is not None:
                raise CheckpointError(
                    f"The checkpoint {self._path} is damaged ({damaged} has another sum than when "
                    "it was written): take another copy of it."
                )
        return super()._load_file(filename)

    def _load_model(self, checkpoint):
        model_weights = self.model.state_dict()
        has_own_names = any(
            key in checkpoint["model"] or "module." + key in checkpoint["model"]
            for key in model_weights
        )
        match_names = checkpoint.pop("matching_heuristics", False) or not has_own_names
        if match_names:
            self._convert_ndarray_to_tensor(checkpoint["model"])
            # Detectron2 would match names in the whole model, where a "bias" is soon found.
            checkpoint["model"] = align_and_update_state_dicts(
                {k: v for k, v in model_weights.items() if k.startswith(_BACKBONE)},
                _strip_backbone_prefix(checkpoint["model"]),
                c2_conversion=checkpoint.get("__author__") == "Caffe2",
            )
        incompatible = super()._load_model(checkpoint)
        left_over = [
            key for key in incompatible.unexpected_keys if match_names or key.startswith(_BACKBONE)
        ]
        self._check(incompatible, left_over)
        return incompatible

    def _log_incompatible_keys(self, incompatible):
        """Said in `_check`, for the keys that matter."""

    def _check(self, incompatible, left_over):
        # Batch norm's counter is absent from some files, and PyTorch then calls it loaded.
        model_keys = {
            key for key in self.model.state_dict() if not key.endswith(".num_batches_tracked")
        }
        wrong_shape = {key for key, _, _ in incompatible.incorrect_shapes}
        missing = model_keys & (set(incompatible.missing_keys) - wrong_shape)
        found = model_keys - missing
        if not found:
            raise CheckpointError(
                f"No weight in {self._path} has the name of one of this model's: it is the "
                f"checkpoint of another architecture ({_some(incompatible.unexpected_keys)})."
            )
        backbone = {key for key in model_keys if key.startswith(_BACKBONE)}
        if found <= backbone:
            self._check_backbone(backbone, found - wrong_shape, left_over)
        elif missing or wrong_shape or incompatible.unexpected_keys:
            self._raise_does_not_fit(incompatible, sorted(missing))

    def _check_backbone(self, backbone, loaded, left_over):
        if self.need_detector:
            raise CheckpointError(
                f"{self._path} holds the weights of a backbone only, a trained detector is needed."
            )
        lacking = sorted(backbone - loaded)
        text = f"{len(loaded)} of the backbone's {len(backbone)} weights are in {self._path}"
        if len(loaded) < _SAME_BACKBONE * len(backbone):
            raise CheckpointError(
                f"Only {text}, it is another backbone's: these do not fit: {_some(lacking)}."
            )
        if len(left_over) > (1 - _SAME_BACKBONE) * len(backbone):
            raise CheckpointError(
                f"{self._path} is another backbone's, it has {len(left_over)} weights too many: "
                f"{_some(left_over)}."
            )
        logger.info("%s; all others start from scratch.", text)
        if lacking:
            logger.warning("Weights of the backbone that start from scratch: %s", _some(lacking))

    def _raise_does_not_fit(self, incompatible, missing):
        wrong_shape = incompatible.incorrect_shapes
        class_counts = {
            (old[0], new[0])
            for key, old, new in wrong_shape
            if "class" in key and old[1:] == new[1:]
        }
        only_classes = all("class" in key for key, _, _ in wrong_shape)
        if len(class_counts) == 1 and only_classes and not missing:
            old, new = class_counts.pop()
            raise CheckpointError(
                f"{self._path} was trained with {old} classes, the config says {new}: set "
                f"model.num_classes={old}, or start from a backbone's weights "
                "(train.init_checkpoint) to train for other classes."
            )
        parts = [
            f"{len(keys)} {what} ({_some(keys)})"
            for what, keys in (
                ("missing", missing),
                ("unexpected", incompatible.unexpected_keys),
                (
                    "of another shape",
                    [f"{k}: {old} in the file, {new} here" for k, old, new in wrong_shape],
                ),
            )
            if keys
        ]
        raise CheckpointError(
            f"{self._path} is the checkpoint of another architecture than the config's: "
            f"{'; '.join(parts)}."
        )


def _strip_backbone_prefix(weights):
    """A detector's weights reduced to its backbone's; weights without such a prefix as they are."""
    for prefix in ("backbone.bottom_up.", _BACKBONE):
        stripped = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        if stripped:
            return stripped
    return weights


def _unreachable_message(path):
    if "://" in path:
        return (
            f"{path} cannot be downloaded: give a local copy with train.init_checkpoint=FILE, "
            "or start from scratch with train.init_checkpoint=''."
        )
    if not PathManager.isfile(path):
        return f"The checkpoint {os.path.abspath(path)} does not exist."
    return f"The checkpoint {path} cannot be read."


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(keys, num=4):
    """The first few keys, in words."""
    keys = list(keys)
    return ", ".join(keys[:num]) + (f" and {len(keys) - num} more" if len(keys) > num else "")
