"""What the training script reads from a config, beside model, data, optimizer and schedule."""

train = dict(
    # Where a config leaves it, it becomes output/NAME after the config's file when it is loaded:
    # output/smca_r50_50ep, output/ablations/head_shared.
    output_dir="output",
    # Weights to start from: a detector, or a backbone (a path, URL or "detectron2://...").
    # "" starts from scratch.
    init_checkpoint="",
    max_iter=90000,
    device="auto",  # "auto": a GPU if there is one, else the CPU
    # Of everything random. Negative: drawn once, and kept by --resume.
    seed=0,
    amp=dict(enabled=False, dtype="bf16"),  # mixed precision
    accumulate=1,  # batches whose gradients are averaged before the optimizer steps
    clip_grad_norm=0.1,  # None: off
    # Iterations in a row that are skipped where the loss or the gradient is nan or infinite;
    # each leaves a file nonfinite_<iteration>.json. 0: the first ends the training.
    skip_nonfinite=0,
    model_ema=dict(enabled=False, decay=0.9997),
    ddp=dict(  # arguments of DistributedDataParallel
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    compile=False,
    # Periods are in iterations (optimizer steps).
    checkpointer=dict(period=5000, max_to_keep=5),
    best_metric="bbox/AP",  # the checkpoint with the highest one is kept as model_best.pth
    eval_period=5000,  # 0: only after the training
    # Evaluations in a row without a better best_metric that end the training. 0: off.
    early_stopping=0,
    log_period=20,
    # Beside TensorBoard, metrics.json and log.txt: wandb, mlflow (the extra "tracking"), or calls
    # of writers, L(MyWriter)(...).
    writers=[],
    hooks=[],  # calls of hooks, L(MyHook)(...), which come before the writers
    num_pictures=4,  # of detections and weight maps, to the writers at each evaluation. 0: none
    cudnn_benchmark=False,
    # A few steps, an evaluation on a few images and a checkpoint, in output_dir/fast_dev_run.
    fast_dev_run=False,
)
