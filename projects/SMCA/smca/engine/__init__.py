from .launch import run
from .train import main
from .trainer import Trainer
