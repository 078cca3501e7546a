#!/usr/bin/env python
"""Train or evaluate a model from a LazyConfig:

    train_net.py --config-file configs/smca_shapes.py train.output_dir=output/shapes
    train_net.py --config-file configs/smca_r50_50ep.py --num-gpus 8 train.amp.enabled=True
    torchrun --nproc-per-node=8 train_net.py --config-file CONFIG
    train_net.py --config-file CONFIG --resume train.output_dir=output/shapes
    train_net.py --config-file CONFIG --eval-only train.init_checkpoint=FILE

Arguments key=value override the config's.
"""

import sys

try:
    from smca.engine import run  # says what to do if Detectron2 is missing
    from detectron2.engine import default_argument_parser  # isort: skip
except ImportError as error:
    sys.exit(f"Error: {error}")

if __name__ == "__main__":
    sys.exit(run(default_argument_parser(epilog=__doc__).parse_args()))
