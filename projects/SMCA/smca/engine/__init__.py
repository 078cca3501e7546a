from .evaluate import do_test
from .evaluation_hooks import BestCheckpointer, EarlyStopping, EvalHook
from .hooks import EmergencyCheckpointer, ModelEMA, PeriodicCheckpointer, ProgressPrinter
from .launch import run
from .train import do_eval, do_train, main
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "EarlyStopping",
    "EmergencyCheckpointer",
    "EvalHook",
    "ModelEMA",
    "PeriodicCheckpointer",
    "ProgressPrinter",
    "Trainer",
    "do_eval",
    "do_test",
    "do_train",
    "main",
    "run",
]
