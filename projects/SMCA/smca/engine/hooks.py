import contextlib
import logging
import math
import os
import sys
import threading
from typing import Any, Collection, Dict, List, Mapping, MutableMapping, Optional, Sequence, Tuple

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, get_event_storage
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from smca.analysis import read_metrics
from smca.checkpoint.files import load_tensors
from smca.engine.peers import Failure, PeerWatch
from smca.engine.signals import React, stop_error
from smca.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "BestCheckpointer",
    "EarlyStopping",
    "EmergencyCheckpointer",
    "EvalHook",
    "MissedEvaluation",
    "ModelEMA",
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
        peers: says when another process has failed, since this one may be waiting for it in vain,
            and is then saved by another thread.
    """

    def __init__(self, checkpointer: Checkpointer, peers: Optional[PeerWatch] = None) -> None:
        self._checkpointer = checkpointer
        self._peers = peers
        # Held while the weights change, and by whoever saves them for the last time.
        self._lock = threading.RLock()
        self._updating = contextlib.ExitStack()
        self._is_updating = self._is_over = False
        # On a GPU, the last complete iteration is done there.
        self._whole: Optional[torch.cuda.Event] = None

    def before_train(self) -> None:
        self._last_complete = self.trainer.start_iter - 1
        self.trainer.before_update = self._before_update
        self.trainer.signals.install()
        if self._peers is not None:
            self._peers.rescue = self._rescue_in_thread

    def _before_update(self) -> None:
        self._updating.enter_context(self._lock)
        self._is_updating = True

    def after_step(self) -> None:
        self._is_updating = False
        self._last_complete = self.trainer.iter
        if self.trainer.device.type == "cuda":
            self._whole = torch.cuda.current_stream().record_event()
        self._updating.close()
        number = self.trainer.stop_signal
        if comm.get_world_size() == 1:
            number = self.trainer.signals.received
        if number is not None:
            raise stop_error(number)

    def after_train(self) -> None:
        with self._lock:
            error = sys.exc_info()[1]
            if error is not None and comm.is_main_process():
                self._rescue(error)
            self._is_over = True
        self._updating.close()

    def _rescue_in_thread(self, failure: Failure) -> None:
        """Save the training while its own thread waits for a process that is gone."""
        with self._lock, contextlib.ExitStack() as stack:
            if self._is_over or not comm.is_main_process():
                return
            self._is_over = True
            if self._whole is not None:
                # The default stream is behind the collective that never ends.
                torch.cuda.set_device(self.trainer.device)
                stream = torch.cuda.Stream()
                stream.wait_event(self._whole)
                stack.enter_context(torch.cuda.stream(stream))
            self._rescue(failure)
            # The main thread shall not go on from here.
            self._lock.acquire()

    def _rescue(self, error: "BaseException | Failure") -> None:
        iteration = self._last_complete
        name = f"model_{iteration:07d}"
        last = self._checkpointer.get_checkpoint_file()
        if self._peers is not None and isinstance(error, RuntimeError):
            # It may be how a collective says that another process is gone.
            error = self._peers.wait_for_failure(5) or error
        reason = getattr(error, "text", type(error).__name__)
        is_saved = os.path.basename(last) == name + ".pth" and os.path.isfile(last)
        is_lost = isinstance(error, FloatingPointError) or self._is_updating
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
        if last:
            logger.error("The training ended early (%s); --resume continues from %s.", reason, last)
        else:
            logger.error("The training ended early (%s) before there was anything to save.", reason)


class EvalHook(hooks.EvalHook):
    """Detectron2's :class:`EvalHook`, which a signal ends at once: the state is whole."""

    def _do_eval(self) -> None:
        with self.trainer.signals.reacting(React.AT_ONCE):
            super()._do_eval()

    def after_train(self) -> None:
        if sys.exc_info()[1] is None:  # not even if it failed in the last iteration
            super().after_train()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's :class:`BestCheckpointer`, resumable: the best value so far is kept in the best
    checkpoint itself, and that checkpoint is never what ``--resume`` continues from (unless there
    is no other). A missing or nan metric is no error.
    """

    _is_warned = False

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter > 0 and os.path.isfile(path):
            try:
                best = load_tensors(path).get("best", {})
            except Exception as error:  # a broken file can raise anything
                logger.warning(
                    "%s cannot be read (%s): the best checkpoint is looked for anew.", path, error
                )
                return
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest()
        value, iteration = latest.get(self._val_metric, (None, None))
        if value is None:
            self._warn_of_missing([name for name in latest if "/" in name])
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

    def _warn_of_missing(self, metrics: List[str]) -> None:
        if metrics and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "train.best_metric=%s is none of the evaluation's, so that no best checkpoint is "
                "kept. There are: %s.",
                self._val_metric,
                ", ".join(sorted(metrics)),
            )


class EarlyStopping(HookBase):
    """Ends the training, in all processes, when a metric has not become better for so many
    evaluations in a row.

    The last state is saved as ``model_final.pth``, and what was best so far is in the checkpoints,
    so that a resumed training ends where an unbroken one does. Put it behind `EvalHook`. An
    evaluation that has no such metric does not count.

    Args:
        period: iterations from one evaluation to the next, as of the `EvalHook`.
        patience: evaluations, at least 1.
        checkpointer: saves the last state.
        metric: such as ``bbox/AP``; more is better.
    """

    def __init__(self, period: int, patience: int, checkpointer: Checkpointer, metric: str):
        self._period = period
        self._patience = patience
        self._checkpointer = checkpointer
        self.metric = metric
        self._best: Optional[float] = None
        self._num_worse = 0  # since the best
        self._last_iter = -1  # of what was counted

    def before_train(self) -> None:
        self._stop_if_due()

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if self._period <= 0 or next_iter % self._period or next_iter == self.trainer.max_iter:
            return
        # Only the main process has results.
        value, iteration = self.trainer.storage.latest().get(self.metric, (None, None))
        self.count(value if iteration == self.trainer.iter else None)

    def count(self, value: Optional[float]) -> None:
        """Take the evaluation of this iteration into account, unless that was done before.

        Args:
            value: of the metric, None if there is none; that of the main process counts.
        """
        value = comm.all_gather(value)[0]
        if value is None or self._last_iter >= self.trainer.iter:
            return
        self._last_iter = self.trainer.iter
        if math.isfinite(value) and (self._best is None or value > self._best):
            self._best, self._num_worse = float(value), 0
        else:
            self._num_worse += 1
        if self._stop_if_due():
            self._checkpointer.save("model_final", iteration=self.trainer.iter)

    def _stop_if_due(self) -> bool:
        if self._num_worse < self._patience:
            return False
        logger.info(
            "The training ends early: %s did not become better than %s in %d evaluations "
            "(train.early_stopping=%d).",
            self.metric,
            "nan" if self._best is None else f"{self._best:.3f}",
            self._num_worse,
            self._patience,
        )
        self.trainer.stopped_early = True
        return True

    def state_dict(self) -> Dict[str, Any]:
        return {"best": self._best, "num_worse": self._num_worse, "last_iter": self._last_iter}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._best, self._num_worse = state_dict["best"], state_dict["num_worse"]
        self._last_iter = state_dict.get("last_iter", -1)


class MissedEvaluation(HookBase):
    """When a training goes on from a checkpoint that should have been evaluated, and was not before
    the run ended, does that first; if it was, `EarlyStopping` counts it, which the checkpoint
    may be too old to say. Put it behind the others.

    Args:
        period: iterations from one evaluation to the next, as of the `EvalHook`.
        metrics_file: metrics.json, which tells what was evaluated.
        steps: the `EvalHook`, and those that act on its results.
    """

    def __init__(self, period: int, metrics_file: str, steps: Sequence[HookBase]) -> None:
        self._period = period
        self._metrics_file = metrics_file
        self._steps = steps

    def before_train(self) -> None:
        trainer = self.trainer
        start = trainer.start_iter
        # What follows the last iteration is evaluated in any case.
        if self._period <= 0 or start % self._period or not 0 < start < trainer.max_iter:
            return
        # Of a training that was to end here, the results are one number further.
        results = comm.all_gather(self._results_of((start - 1, start)))[0]
        trainer.iter = trainer.storage.iter = start - 1
        if not results:
            logger.info("The evaluation of iteration %d is made up for.", start - 1)
        for hook in self._steps:
            if not results:
                hook.after_step()
            elif isinstance(hook, EarlyStopping):
                hook.count(results.get(hook.metric))
        trainer.iter = trainer.storage.iter = start

    def _results_of(self, iterations: Collection[int]) -> Dict[str, float]:
        """What metrics.json has of an evaluation after one of these iterations, by its name."""
        try:
            metrics = read_metrics(self._metrics_file)
        except UserError:  # nothing was written yet
            return {}
        # The results' names are task/metric.
        return {
            name: value
            for name, (found, values) in metrics.items()
            if "/" in name
            for iteration, value in zip(found, values)
            if iteration in iterations
        }


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
