from .launch import run
from .train import main
from .trainer import Trainer

__all__ = ["Trainer", "main", "run"]
