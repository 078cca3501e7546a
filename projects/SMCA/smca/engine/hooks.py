import logging
import os
import sys
from typing import Any, Dict, Mapping, MutableMapping, Optional, Tuple

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, get_event_storage
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from smca.engine.signals import stop_error

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "EmergencyCheckpointer",
    "ModelEMA",
    "PeriodicCheckpointer",
    "ProgressPrinter",
]

logger = logging.getLogger(__name__)


class _AveragedWeights(AveragedModel):
    """An average whose state dict has the keys of the model itself, so that it loads as one."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:  # type: ignore[override]
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Zero would make the next update start over with a copy of the weights.
        self.n_averaged.fill_(1)
        return self.module.load_state_dict(state_dict, *args, **kwargs)


class ModelEMA(HookBase):
    """Keeps the exponential moving average of the weights: after each iteration
    ``average = decay * average + (1 - decay) * weights``, beginning with the weights after the
    first. Buffers, such as the running statistics of batch norm, are averaged like weights.

    Give `averaged` to the checkpointer (``model_ema=hook.averaged``) to save and restore it.

    Args:
        model: not wrapped in DistributedDataParallel.
        decay: in [0, 1).

    Attributes:
        averaged: the average with what it takes to continue it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._source = model
        self.averaged = _AveragedWeights(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The average, for evaluation."""
        return self.averaged.module

    def after_step(self) -> None:
        self.averaged.update_parameters(self._source)


class PeriodicCheckpointer(HookBase):
    """Saves ``model_<iteration>.pth`` after every `period` iterations, and ``model_final.pth``
    after the training. The checkpoints of the last iteration are written after its metrics,
    because a training that is resumed from them does not repeat it.

    Args:
        checkpointer: saves the state.
        period: iterations from one checkpoint to the next, at least 1.
    """

    def __init__(self, checkpointer: Checkpointer, period: int) -> None:
        self._checkpointer = checkpointer
        self._period = period

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self._save_if_due()

    def after_train(self) -> None:
        if self.trainer.error is not None:
            return
        if self.trainer.last_iter + 1 == self.trainer.max_iter:
            self._save_if_due()
        self._checkpointer.save("model_final", iteration=self.trainer.last_iter)

    def _save_if_due(self) -> None:
        iteration = self.trainer.last_iter
        if (iteration + 1) % self._period == 0:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


class EmergencyCheckpointer(HookBase):
    """When the training ends by an error, ctrl-C, SIGTERM or SIGUSR1, saves the state after the
    last complete iteration as ``model_<iteration>.pth``, from where ``--resume`` continues.

    Put it behind the hooks that change what is saved (schedule, average of the weights) and
    before those that only report. A signal takes effect after the iteration, in all processes
    after the same one; a second one at once, but for an update of the weights that has begun,
    because half an update cannot be resumed. In an evaluation (:class:`EvalHook`), and while a
    process alone waits for data, the first one takes effect at once.

    Args:
        checkpointer: saves the state.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def before_train(self) -> None:
        self._last_complete = self.trainer.start_iter - 1
        self.trainer.signals.install()

    def after_step(self) -> None:
        self._last_complete = self.trainer.iter
        self.trainer.is_updating = False
        number = self.trainer.stop_signal
        if comm.get_world_size() == 1:
            number = self.trainer.signals.received
        if number is not None:
            raise stop_error(number)

    def after_train(self) -> None:
        error = self.trainer.error
        if error is None:
            return
        if comm.is_main_process():
            self._save(error)
        if self.trainer.stop_signal is not None and not isinstance(error, Exception):
            # All processes are here. Whoever supervises them may kill the first when others end.
            comm.synchronize()

    def _save(self, error: BaseException) -> None:
        iteration = self._last_complete
        name = f"model_{iteration:07d}"
        last = self._checkpointer.get_checkpoint_file()
        is_saved = os.path.basename(last) == name + ".pth" and os.path.isfile(last)
        # An update of the weights that has begun is not undone.
        is_lost = isinstance(error, FloatingPointError) or self.trainer.is_updating
        has_trained = iteration >= self.trainer.start_iter
        if has_trained:
            # What is saved here, and the last line of the metrics, stand at this iteration.
            self.trainer.iter = self.trainer.storage.iter = iteration
        if has_trained and not (is_saved or is_lost):
            self.trainer.restore_statistics()
            try:
                self._checkpointer.save(name, iteration=iteration)
                last = self._checkpointer.get_checkpoint_file()
            except Exception as save_error:  # which must not hide the first error
                logger.error("The state could not be saved: %s", save_error)
        reason = type(error).__name__
        if last:
            logger.error("The training ended early (%s); --resume continues from %s.", reason, last)
        else:
            logger.error("The training ended early (%s) before there was anything to save.", reason)


def _peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class _LineEnd(logging.LoggerAdapter):
    """Appends what Detectron2's progress line lacks."""

    def process(
        self, msg: str, kwargs: MutableMapping[str, Any]
    ) -> Tuple[str, MutableMapping[str, Any]]:
        grad_norm, _ = get_event_storage().latest().get("grad_norm", (None, None))
        if grad_norm is not None:
            msg += f"  grad_norm: {grad_norm:.4g}"
        if resource is not None and not torch.cuda.is_available():
            msg += f"  max_mem: {_peak_memory_mb():.0f}M"
        return msg, kwargs


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's progress line (losses, ETA, times, learning rate, memory of the GPU), with the
    norm of the gradient and, without a GPU, the peak memory of the process.
    """

    def __init__(self, max_iter: Optional[int] = None, window_size: int = 20) -> None:
        super().__init__(max_iter, window_size)
        self.logger: Any = _LineEnd(self.logger, {})

    def _get_eta(self, storage: EventStorage) -> Optional[str]:
        # Called twice in an iteration that fails early, the original divides by zero.
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)
