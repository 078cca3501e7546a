import logging
import os
import resource
import signal
import sys
import threading

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["BestCheckpointer", "EmergencyCheckpointer", "ModelEMA", "ProgressPrinter"]

logger = logging.getLogger(__name__)


class _AveragedWeights(AveragedModel):
    """An average whose state dict has the keys of the model itself, so that it loads as one."""

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, *args, **kwargs):
        # Zero would make the next update start over with a copy of the weights.
        self.n_averaged.fill_(1)
        return self.module.load_state_dict(state_dict, *args, **kwargs)


class ModelEMA(HookBase):
    """
    Keeps the exponential moving average of the weights: after each iteration
    ``average = decay * average + (1 - decay) * weights``, beginning with the weights after the
    first. Buffers, such as the running statistics of batch norm, are averaged like weights.

    Give `averaged` to the checkpointer (``model_ema=hook.averaged``) to save and restore it.

    Attributes:
        model (nn.Module): the average, for evaluation.
        averaged (AveragedModel): the average with what it takes to continue it.
    """

    def __init__(self, model, decay):
        """
        Args:
            model (nn.Module): not wrapped in DistributedDataParallel.
            decay (float): in [0, 1).
        """
        self._source = model
        self.averaged = _AveragedWeights(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        self.averaged.requires_grad_(False)

    @property
    def model(self):
        return self.averaged.module

    def after_step(self):
        self.averaged.update_parameters(self._source)


class EmergencyCheckpointer(HookBase):
    """
    When the training ends by an error, ctrl-C or SIGTERM, saves the state after the last
    complete iteration as ``model_<iteration>.pth``, from where ``--resume`` continues.

    Put it behind the hooks that change what is saved (schedule, average of the weights) and
    before those that only report. An update of the weights that has begun is finished before
    ctrl-C and SIGTERM take effect, because half an update cannot be resumed.
    """

    def __init__(self, checkpointer):
        self._checkpointer = checkpointer
        self._updating = False
        self._pending_signal = None
        self._previous_handlers = {}
        self._statistics = []

    def before_train(self):
        self._last_complete = self.trainer.start_iter - 1
        batch_norms = get_bn_modules(self.trainer.model)
        self._running = [buffer for module in batch_norms for buffer in module.buffers()]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self._updating:
            self._pending_signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def before_step(self):
        # The forward pass of an iteration that fails later has changed these already.
        self._statistics = [buffer.clone() for buffer in self._running]

    def after_backward(self):
        self._updating = True

    def after_step(self):
        self._updating = False
        self._last_complete = self.trainer.iter
        self._statistics = []
        if self._pending_signal is not None:
            self._on_signal(self._pending_signal, None)

    def after_train(self):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        error = sys.exc_info()[1]
        if error is not None and comm.is_main_process():
            self._rescue(error)

    def _rescue(self, error):
        iteration = self._last_complete
        name = f"model_{iteration:07d}"
        last = self._checkpointer.get_checkpoint_file()
        reason = f"The training ended early ({type(error).__name__})"
        is_saved = os.path.basename(last) == name + ".pth"
        is_lost = isinstance(error, FloatingPointError) or self._updating
        if not (is_saved or is_lost) and iteration >= self.trainer.start_iter:
            for buffer, value in zip(self._running, self._statistics):
                buffer.copy_(value)
            # Hooks that follow take this for where the training stands, too.
            self.trainer.iter = iteration
            try:
                self._checkpointer.save(name, iteration=iteration)
                last = self._checkpointer.get_checkpoint_file()
            except OSError as save_error:
                logger.error("The state could not be saved: %s", save_error)
        if last:
            logger.error("%s; --resume continues from %s.", reason, last)
        else:
            logger.error("%s before there was anything to save.", reason)


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Detectron2's :class:`BestCheckpointer`, resumable: the best value so far is kept in the best
    checkpoint itself, and that checkpoint is never what ``--resume`` continues from (unless
    there is no other). A missing or nan metric is no error.
    """

    def before_train(self):
        path = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter > 0 and os.path.isfile(path):
            best = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            best = best.get("best", {})
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _best_checking(self):
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (None, None))
        if value is None or iteration == self.best_iter:
            return
        if self.best_metric is not None and not self._compare(value, self.best_metric):
            return
        if not self._update_best(value, iteration):
            return
        last = self._checkpointer.get_checkpoint_file()
        best = {"metric": self._val_metric, "value": float(value), "iteration": int(iteration)}
        self._checkpointer.save(self._file_prefix, best=best)
        if last:
            self._checkpointer.tag_last_checkpoint(os.path.basename(last))
        logger.info("Best %s so far: %.3f at iteration %d.", self._val_metric, value, iteration)


def _peak_memory_mb():
    """Largest resident memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class _LineEnd(logging.LoggerAdapter):
    """Appends what Detectron2's progress line lacks."""

    def process(self, msg, kwargs):
        grad_norm, _ = get_event_storage().latest().get("grad_norm", (None, None))
        if grad_norm is not None:
            msg += f"  grad_norm: {grad_norm:.4g}"
        if not torch.cuda.is_available():
            msg += f"  max_mem: {_peak_memory_mb():.0f}M"
        return msg, kwargs


class ProgressPrinter(CommonMetricPrinter):
    """
    Detectron2's progress line (losses, ETA, times, learning rate, memory of the GPU), with the
    norm of the gradient and, without a GPU, the peak memory of the process.
    """

    def __init__(self, max_iter=None, window_size=20):
        super().__init__(max_iter, window_size)
        self.logger = _LineEnd(self.logger, {})

    def _get_eta(self, storage):
        # Called twice in an iteration that fails early, the original divides by zero.
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)
