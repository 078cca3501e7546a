"""Hooks of a training: they average the weights, save, evaluate, and end a training early."""

import copy
import logging
import os

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from smca.checkpoint.files import peek
from smca.engine.signals import stop_error

logger = logging.getLogger(__name__)


class ModelEMA(HookBase):
    """Keeps the exponential moving average of the weights: after each iteration
    ``average = decay * average + (1 - decay) * weights``, beginning with the weights after the
    first. Buffers, such as the running statistics of batch norm, are averaged like weights.

    Args:
        model: a model that is not wrapped in DistributedDataParallel.
        decay: a number in [0, 1).

    Attributes:
        model: the average, for the checkpointer (``model_ema=hook.model``) and for evaluation.
    """

    has_begun = False  # there were weights to average, or an average was loaded into the model

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._source = model
        self._average = get_ema_multi_avg_fn(decay)
        self.model.register_load_state_dict_post_hook(lambda *_: setattr(self, "has_begun", True))

    @torch.no_grad()
    def after_step(self) -> None:
        # PyTorch's AveragedModel copies a number to the GPU in each step, and waits for it.
        own, new = ([*m.parameters(), *m.buffers()] for m in (self.model, self._source))
        is_averaged = [self.has_begun and x.is_floating_point() for x in own]
        for average, value, skip in zip(own, new, is_averaged):
            if not skip:
                average.copy_(value)
        if self.has_begun:
            floats = ([x for x, use in zip(each, is_averaged) if use] for each in (own, new))
            self._average(*floats, 1)
        self.has_begun = True


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, except that it writes the checkpoints of the last iteration after its metrics,
    because a training that is resumed from them does not repeat it.
    """

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            super().after_step()

    def after_train(self) -> None:
        if self.trainer.error is None:
            self.max_iter = self.trainer.last_iter + 1  # it may have ended early
            self.step(self.trainer.last_iter)


class EmergencyCheckpointer(HookBase):
    """Saves the state after the last complete iteration as ``model_<iteration>.pth`` when the
    training ends by an error, Ctrl-C, SIGTERM, or SIGUSR1. ``--resume`` continues from there.

    Register this hook after those that change what is saved (schedule, average of the weights).
    A signal takes effect after the iteration, which is the same one in all processes; at once in an
    evaluation (:class:`EvalHook`), and while a single process waits for data.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    def before_train(self) -> None:
        self.trainer.signals.install()

    def after_step(self) -> None:
        self.trainer.is_updating = False
        number = self.trainer.stop_signal
        if comm.get_world_size() == 1:
            number = self.trainer.signals.received
        if number is not None:
            raise stop_error(number)

    def after_train(self) -> None:
        error = self.trainer.error
        if error is not None and comm.is_main_process():
            self._save(error)
        if self.trainer.stop_signal is not None and not isinstance(error, Exception):
            # All processes are here. Whoever supervises them may kill the first when others end.
            comm.synchronize()

    def _save(self, error: BaseException) -> None:
        trainer, iteration = self.trainer, self.trainer.last_iter
        if iteration >= trainer.start_iter:
            # What is saved here, and the last line of the metrics, stand at this iteration.
            trainer.iter = trainer.storage.iter = iteration
            # An update of the weights that has begun is not undone.
            if not (isinstance(error, FloatingPointError) or trainer.is_updating):
                trainer.restore_statistics()
                try:
                    self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
                except Exception as save_error:  # which must not hide the first error
                    logger.error("The state could not be saved: %s", save_error)
        last = self._checkpointer.get_checkpoint_file()
        where = f"; --resume continues from {last}" if last else ", and nothing is saved"
        logger.error("The training ended early (%s)%s.", type(error).__name__, where)


class EvalHook(hooks.EvalHook):
    """Detectron2's :class:`EvalHook`, except that a stop signal ends an evaluation at once, and
    that a training which resumes where an evaluation was due begins with it, because the process
    may have been killed before it was done.
    """

    def before_train(self) -> None:
        trainer = self.trainer
        start = trainer.start_iter
        if self._period > 0 and start % self._period == 0 and 0 < start < trainer.max_iter:
            logger.info("Iteration %d is evaluated first.", start - 1)
            trainer.storage.iter = start - 1
            self._do_eval()
            trainer.storage.iter = start

    def _do_eval(self) -> None:
        with self.trainer.signals.interruptible():
            super()._do_eval()

    def after_train(self) -> None:
        if self.trainer.error is None:  # not even if it failed in the last iteration
            super().after_train()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's :class:`BestCheckpointer`, resumable: the best value so far is kept in the best
    checkpoint itself, and ``--resume`` never continues from it (unless there is no other). A
    missing or nan metric is no error.

    It also ends the training after `patience` evaluations in a row without a better value, unless
    that is 0. Register it after `EvalHook`, in all processes; the results of the evaluation must be
    in the storage of each.
    """

    def __init__(
        self, eval_period: int, checkpointer: Checkpointer, metric: str, patience: int = 0
    ) -> None:
        super().__init__(eval_period, checkpointer, metric)
        self._patience = patience
        self._is_warned = False

    def before_train(self) -> None:
        if self.trainer.start_iter > 0:
            path = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
            content = peek(path)
            if not content and os.path.isfile(path):
                logger.warning("%s cannot be read: the best checkpoint is looked for anew.", path)
            # A process on another machine may not have the file.
            best = comm.all_gather(content.get("best", {}))[0]
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]
        self._best_checking()  # where the training begins with an evaluation

    def _best_checking(self) -> None:
        latest, metric = self.trainer.storage.latest(), self._val_metric
        value, iteration = latest.get(metric, (None, None))
        if value is None:
            known = sorted(name for name in latest if "/" in name)
            if known and not self._is_warned:
                self._is_warned = True
                logger.warning(
                    "train.best_metric=%s is none of the evaluation's, so that no best checkpoint "
                    "is kept. There are: %s.",
                    metric,
                    ", ".join(known),
                )
            return
        if self.best_metric is None or self._compare(value, self.best_metric):
            if self._update_best(value, iteration):
                best = {"metric": metric, "value": float(value), "iteration": int(iteration)}
                self._checkpointer.save(self._file_prefix, tag=False, best=best)
                logger.info("Best %s so far: %.3f at iteration %d.", metric, value, iteration)
        since = iteration - (-1 if self.best_iter is None else self.best_iter)
        is_over = self.trainer.iter >= self.trainer.max_iter
        if self._patience and not is_over and since >= self._patience * self._period:
            logger.info(
                "The training ends early: %s did not become better in %d evaluations "
                "(train.early_stopping).",
                metric,
                self._patience,
            )
            self.trainer.stopped_early = True
