"""ADE20K at 512 pixels: 150 classes; 0 in the masks is ignored."""

crop_size = (512, 512)
scale = (2048, 512)  # longest and shortest side at most
data_root = "data/ADEChallengeData2016"

train_pipeline = [
    dict(type="LoadPicture", skip_bad=True),
    dict(type="LoadMask"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadPicture"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadMask"),  # after Resize: predictions are compared at the mask's own size
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadPicture"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale_factor=factor, keep_ratio=True)
                for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadMask")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
tta_model = dict(type="SegTTAModel")

dataset = dict(type="ImagesAndMasks", classes="ade20k", data_root=data_root, reduce_zero_label=True)
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="WholeIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
