"""The defaults of the section `train`; smca/config/train.py describes each key."""

from dataclasses import asdict

from smca.config import TrainConfig

train = asdict(TrainConfig())
