from .build import build_run
from .hooks import (
    BestCheckpointer,
    EarlyStopping,
    EmergencyCheckpointer,
    EvalHook,
    ModelEMA,
    PeriodicCheckpointer,
)
from .launch import run
from .train import do_eval, do_test, do_train, main
from .trainer import Trainer
from .writers import ProgressPrinter

__all__ = [
    "BestCheckpointer",
    "EarlyStopping",
    "EmergencyCheckpointer",
    "EvalHook",
    "ModelEMA",
    "PeriodicCheckpointer",
    "ProgressPrinter",
    "Trainer",
    "build_run",
    "do_eval",
    "do_test",
    "do_train",
    "main",
    "run",
]
