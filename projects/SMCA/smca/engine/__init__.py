from .config import load_config
from .hooks import BestCheckpointer, EmergencyCheckpointer, ModelEMA, ProgressPrinter
from .launch import run
from .train import build_model, do_eval, do_test, do_train, main
from .trainer import Trainer

__all__ = [
    "BestCheckpointer",
    "EmergencyCheckpointer",
    "ModelEMA",
    "ProgressPrinter",
    "Trainer",
    "build_model",
    "do_eval",
    "do_test",
    "do_train",
    "load_config",
    "main",
    "run",
]
