"""Hooks that evaluate, keep the best weights, and end a training early."""

import logging
import math
import os
from typing import Any, Dict, List, Optional

from detectron2.engine import HookBase, hooks

from smca.checkpoint.files import load_tensors
from smca.engine.signals import React

__all__ = ["BestCheckpointer", "EarlyStopping", "EvalHook"]

logger = logging.getLogger(__name__)


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
        with self.trainer.signals.reacting(React.AT_ONCE):
            super()._do_eval()

    def after_train(self) -> None:
        if self.trainer.error is None:  # not even if it failed in the last iteration
            super().after_train()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's :class:`BestCheckpointer`, resumable: the best value so far is kept in the best
    checkpoint itself, and ``--resume`` never continues from it (unless there is no other). A
    missing or nan metric is no error.
    """

    _is_warned = False

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, self._file_prefix + ".pth")
        if self.trainer.start_iter > 0 and os.path.isfile(path):
            self._load_best(path)
        self._best_checking()  # where the training began with an evaluation

    def _load_best(self, path: str) -> None:
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
        best = {"metric": self._val_metric, "value": float(value), "iteration": int(iteration)}
        self._checkpointer.save(self._file_prefix, tag=False, best=best)
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
    """Ends the training when a metric has not become better for some evaluations in a row.

    Register it after `EvalHook`, in all processes; the results of the evaluation must be in the
    storage of each. The count is saved in checkpoints, so that a resumed training ends where an
    unbroken one does. An evaluation without this metric does not count.

    Args:
        patience: number of evaluations without a better value, at least 1.
        metric: for example ``bbox/AP``; more is better.
    """

    def __init__(self, patience: int, metric: str):
        self._patience = patience
        self._metric = metric
        self._best: Optional[float] = None
        self._num_worse = 0  # evaluations since the best one
        self._last_iter = -1  # of the last evaluation that was counted

    def before_train(self) -> None:
        self._count()
        self._stop_if_due()

    def after_step(self) -> None:
        if self._count():
            self._stop_if_due()

    def _count(self) -> bool:
        """Count the last evaluation, unless that was done before."""
        value, iteration = self.trainer.storage.latest().get(self._metric, (None, -1))
        if value is None or iteration <= self._last_iter:
            return False
        self._last_iter = iteration
        if math.isfinite(value) and (self._best is None or value > self._best):
            self._best, self._num_worse = float(value), 0
        else:
            self._num_worse += 1
        return True

    def _stop_if_due(self) -> None:
        if self._num_worse < self._patience:
            return
        logger.info(
            "The training ends early: %s did not become better than %s in %d evaluations "
            "(train.early_stopping=%d).",
            self._metric,
            "nan" if self._best is None else f"{self._best:.3f}",
            self._num_worse,
            self._patience,
        )
        self.trainer.stopped_early = True

    def state_dict(self) -> Dict[str, Any]:
        return {"best": self._best, "num_worse": self._num_worse, "last_iter": self._last_iter}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._best, self._num_worse = state_dict["best"], state_dict["num_worse"]
        self._last_iter = state_dict["last_iter"]
