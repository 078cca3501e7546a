import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from smca.checkpoint import files
from smca.checkpoint.fine_tuning import adapt, has_class_rows
from smca.errors import CheckpointError, differing, some
from smca.version import __version__

logger = logging.getLogger(__name__)

_BACKBONE = "backbone."
# The share of a backbone's weights that a file may lack, or have beside them. Published files lack
# a few (the norms that Swin has before its outputs) and have a few more (the classifier).
_TOLERATED = 0.1
# Detectron2's own model zoo, whose pickles are opened like any program of Detectron2.
_MODEL_ZOO = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
# What a checkpoint says about itself
_TYPES = dict(config=str, overrides=list, fitted=dict, class_names=list, category_ids=list)


class SMCACheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for a detector with a ``backbone``, which loads a checkpoint whole
    or not at all.

    A file fits if it has exactly the detector's weights, or if it is a backbone's: none but the
    backbone's weights are found in it, with the prefix ``backbone.``, Detectron2's
    ``backbone.bottom_up.``, or without one (``detectron2://ImageNetPretrained/...``).

    Unless `need_detector`, a detector's file of other classes or another number of queries fits
    too (:func:`smca.checkpoint.fine_tuning.adapt`).

    It also writes where a checkpoint comes from under the key ``smca``. Files are written whole
    or not at all, and opening one never runs code in it, Detectron2's own model zoo excepted.

    Args:
        need_detector: a backbone's file, or a detector's of other classes or queries, is an error
            in :meth:`load`.
        provenance: plain values to keep in the checkpoints, for instance the config's name and the
            class names.
        max_to_keep: number of files ``model_<iteration>.pth`` in `save_dir`, whichever run wrote
            them, that stay after a save; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        need_detector: bool = False,
        provenance: Optional[Dict[str, Any]] = None,
        max_to_keep: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, save_dir, **kwargs)
        self.need_detector = need_detector
        self.max_to_keep = max_to_keep
        self.provenance = {**(provenance or {}), "version": __version__}

    def save(self, name: str, tag: bool = True, **kwargs: Any) -> None:
        """Save as Detectron2 does; if `tag` is true, name the file in ``last_checkpoint``, from
        where a training is resumed. A file that cannot be written is a CheckpointError."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), "smca": self.provenance}
        data.update((key, each.state_dict()) for key, each in self.checkpointables.items())
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        self._write(path, lambda file: torch.save(data, file))
        if tag:
            self.tag_last_checkpoint(f"{name}.pth")
        if self.max_to_keep is not None:
            for path in files.by_time(self.save_dir, "model_[0-9]*.pth")[: -self.max_to_keep]:
                if os.path.basename(path) != files.read_tag(self.save_dir):
                    os.remove(path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        self._write(path, last_filename_basename.encode())

    def _write(self, path: str, content: Any) -> None:
        try:
            files.write_atomically(path, content)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be written ({error}): make room or correct "
                "the rights, then go on with --resume."
            ) from error

    def get_checkpoint_file(self) -> str:
        """Path of the checkpoint to go on from (which may be gone), or ""."""
        return next(iter(files.find_checkpoints(self.save_dir)), "")

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Load as Detectron2 does; a file that cannot be read or does not fit the model is a
        CheckpointError."""
        self._path = path
        try:
            with files.reading(path):
                return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # which Detectron2 leaves set after an error

    def find_resumable(self, need_trainer: bool = True) -> Optional[Tuple[str, Dict[str, Any]]]:
        """The newest checkpoint in `save_dir` that can be read (with more than weights, if
        `need_trainer`), its path and what it holds; None where there is no checkpoint. Newer ones
        that cannot be read are named in a warning, or in a CheckpointError if there is no other."""
        problems: List[str] = []
        for path in files.find_checkpoints(self.save_dir):
            try:
                with files.reading(path):
                    checkpoint = files.load_tensors(path)
                    if "model" not in checkpoint or (need_trainer and "trainer" not in checkpoint):
                        raise CheckpointError(f"The checkpoint {path} is none of a training.")
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning("%s Resuming from %s in its place.", problem, path)
            return path, checkpoint
        if problems:
            raise CheckpointError(
                f"{' '.join(problems)} There is no other in {self.save_dir} to resume from."
            )
        return None

    def resume(self, path: str, content: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Load a training's checkpoint with everything in it; it must be a detector's. Gives what
        no checkpointable object took. All processes call this together: those that cannot read the
        file get it from the first, which then has to give its content, where it is read already.
        """
        self.need_detector, self._path = True, path
        if comm.get_world_size() > 1 and not all(comm.all_gather(os.path.isfile(path))):
            contents = [content]
            dist.broadcast_object_list(contents)
            content = contents[0]
        if content is None:
            return self.load(path)
        self._load_model(content)
        for key, checkpointable in self.checkpointables.items():
            if key in content:
                checkpointable.load_state_dict(content.pop(key))
        return content

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if not filename.endswith(".pkl") or self._path.startswith(_MODEL_ZOO):
            return super()._load_file(filename)
        return files.load_arrays(filename)

    def _torch_load(self, f: str) -> Any:
        return files.load_tensors(f)

    def _load_model(self, checkpoint: Dict[str, Any]) -> None:  # it checks and logs itself
        model_weights = self.model.state_dict()
        if "timm" in checkpoint:
            self._leave_out_unused(checkpoint, model_weights)
        has_own_names = any(
            key in checkpoint["model"] or "module." + key in checkpoint["model"]
            for key in model_weights
        )
        match_names = checkpoint.pop("matching_heuristics", False) or not has_own_names
        adapted: List[str] = []
        if match_names:
            self._convert_ndarray_to_tensor(checkpoint["model"])
            weights, prefixes = checkpoint["model"], ("backbone.bottom_up.", _BACKBONE)
            # Of a whole detector only the backbone's weights.
            start = next((p for p in prefixes if any(k.startswith(p) for k in weights)), "")
            # Detectron2 would match names in the whole model, where a "bias" is soon found.
            checkpoint["model"] = align_and_update_state_dicts(
                {k: v for k, v in model_weights.items() if k.startswith(_BACKBONE)},
                {k[len(start) :]: v for k, v in weights.items() if k.startswith(start)},
                c2_conversion=checkpoint.get("__author__") == "Caffe2",
            )
        elif not self.need_detector:
            weights = checkpoint["model"]
            self._convert_ndarray_to_tensor(weights)
            consume_prefix_in_state_dict_if_present(weights, "module.")
            said = checkpoint.get("smca") or files.read_published(self._path)
            old_names = said.get("class_names") or []
            new_names = self.provenance.get("class_names") or []
            adapted = adapt(weights, model_weights, old_names, new_names)
        self._check(super()._load_model(checkpoint), match_names)
        if adapted:
            logger.info("All weights of %s are kept, but %s.", self._path, "; ".join(adapted))

    def _leave_out_unused(self, checkpoint: Dict[str, Any], model_weights: Dict[str, Any]) -> None:
        """Of timm's weights, those of the parts that the backbone has not built."""
        name, own = checkpoint.pop("timm"), getattr(self.model.backbone, "name", None)
        if name != own:
            raise CheckpointError(
                f"{self._path} holds weights of timm's {name}, the backbone of the config is "
                f"{own or 'not of timm'}: set model.backbone accordingly."
            )
        checkpoint["model"] = {k: v for k, v in checkpoint["model"].items() if k in model_weights}

    def _check(self, incompatible: _IncompatibleKeys, match_names: bool) -> None:
        """Raise if these are neither the detector's weights nor its backbone's."""
        # Batch norm's counter is absent from some files, and PyTorch then calls it loaded.
        model_keys = {
            key for key in self.model.state_dict() if not key.endswith(".num_batches_tracked")
        }
        unexpected = incompatible.unexpected_keys
        wrong_shape = {key for key, _, _ in incompatible.incorrect_shapes}
        missing = model_keys & (set(incompatible.missing_keys) - wrong_shape)
        found = model_keys - missing
        if not found:
            raise CheckpointError(
                f"No weight in {self._path} has the name of one of this model's: it is the "
                f"checkpoint of another architecture ({some(unexpected)})."
            )
        backbone = {key for key in model_keys if key.startswith(_BACKBONE)}
        if found <= backbone:
            left_over = [key for key in unexpected if match_names or key.startswith(_BACKBONE)]
            self._check_backbone(backbone, found - wrong_shape, left_over)
        elif missing or wrong_shape or unexpected:
            shapes = incompatible.incorrect_shapes
            texts = [f"{key} is {old} in the file, {new} here" for key, old, new in shapes]
            texts += [f"{key} is not in the file" for key in sorted(missing)]
            texts += [f"{key} is only in the file" for key in unexpected]
            parts = dict.fromkeys(text.partition(".")[0] for text in texts)
            raise CheckpointError(
                f"{self._path} is the checkpoint of another architecture than the config's, in "
                f"{', '.join(parts)} ({some(texts, 1)}): take the config that it was trained with, "
                "such as the config.yaml beside it (for a fine-tuning by base.config)."
            )

    def _check_backbone(
        self, backbone: Set[str], loaded: Set[str], left_over: Sequence[str]
    ) -> None:
        if self.need_detector:
            raise CheckpointError(
                f"{self._path} holds the weights of a backbone only, a trained detector is needed."
            )
        lacking, tolerated = sorted(backbone - loaded), _TOLERATED * len(backbone)
        if max(len(lacking), len(left_over)) > tolerated:
            kinds = differing({"missing": lacking, "unexpected": left_over})
            raise CheckpointError(f"{self._path} holds the weights of another backbone: {kinds}.")
        logger.info(
            "%d of the backbone's %d weights are in %s; all others start from scratch%s.",
            len(loaded),
            len(backbone),
            self._path,
            f", among them {some(lacking)}" if lacking else "",
        )


def read_provenance(weights: Optional[str]) -> Dict[str, Any]:
    """:func:`provenance_of` a checkpoint's path or URL. It is empty for a file that cannot be read,
    of which loading it into the model gives a better error."""
    try:
        return provenance_of(files.peek(PathManager.get_local_path(weights)))
    except Exception:
        return {}


def provenance_of(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """What the content of a checkpoint says about itself: the keys that it has of ``config`` (its
    name), ``overrides``, ``fitted`` (settings that followed from the training data, by their keys),
    ``class_names``, ``category_ids`` (in the training data's JSON), and ``num_classes``."""
    said = checkpoint.get("smca")  # a stranger's file may hold anything under this name
    said = said if isinstance(said, dict) else {}
    result = {key: said[key] for key, kind in _TYPES.items() if isinstance(said.get(key), kind)}
    rows = next((x for name, x in checkpoint["model"].items() if has_class_rows(name)), None)
    if rows is not None:
        result["num_classes"] = len(rows)
    return result
