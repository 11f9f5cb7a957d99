"""Schedule of a run. Lengths are in epochs; iterations follow from the images and the batch."""

train = dict(
    output_dir="output/det",
    # A checkpoint of pretraining, or a detector to go on from or to evaluate.
    init_checkpoint="",
    epochs=25,
    warmup_epochs=0.125,
    # optimizer.lr is for so many images a step and scales with the batch, unless scale_lr=false.
    base_batch_size=32,
    scale_lr=True,
    # Micro-batches of a step: 4 needs about a quarter of the memory, the step is the same.
    accum_iter=1,
    # auto (bf16 where the GPU has it, else fp16 on CUDA, none elsewhere), bf16, fp16 or none.
    amp="auto",
    clip_grad=None,  # largest gradient norm
    seed=0,
    log_period=20,  # iterations
    checkpoint_epochs=1,
    checkpoints_kept=3,
    eval_epochs=5,
    ddp=dict(broadcast_buffers=False, fp16_compression=False),
)
