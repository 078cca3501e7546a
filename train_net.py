#!/usr/bin/env python
"""
Train or evaluate a model from a LazyConfig:

    train_net.py --config-file configs/smca_shapes.py train.output_dir=output/shapes
    train_net.py --config-file configs/smca_r50_50ep.py --num-gpus 8 train.amp.enabled=True
    train_net.py --config-file CONFIG --resume train.output_dir=output/shapes
    train_net.py --config-file CONFIG --eval-only train.init_checkpoint=FILE
"""
import sys

from detectron2.engine import default_argument_parser

from smca.engine import run

if __name__ == "__main__":
    sys.exit(run(default_argument_parser(epilog=__doc__).parse_args()))
