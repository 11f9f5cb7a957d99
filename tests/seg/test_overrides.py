import pytest

from SEG import options, train
from util.errors import UsageError

CONFIG = "SEG/configs/upernet_convmae_base_512_slide_160k_ade20k.py"


def change(*settings: str):
    return options.read_config(train.parse_args([CONFIG, "--cfg-options", *settings]))


def test_settings_that_are_there_or_are_arguments_of_what_is_built_are_taken():
    """The second half is not written out in the config."""
    config = change(
        "train_dataloader.batch_size=4", "optim_wrapper.optimizer.lr=5e-5",
        "param_scheduler.1.end=9", "train_dataloader.dataset.pipeline.2.scale=(64,32)",
        "optim_wrapper.clip_grad.max_norm=1", "train_dataloader.dataset.indices=5",
        "model.decode_head.loss_decode.class_weight=[1,2]", "log_processor.window_size=5",
        "model.data_preprocessor.test_cfg.size_divisor=32", "randomness.deterministic=True",
        "train_dataloader.pin_memory=True", "model.decode_head.norm_cfg.momentum=0.5",
        "optim_wrapper.optimizer.type=SGD", "optim_wrapper.optimizer.nesterov=True",
    )  # fmt: skip
    assert config.train_dataloader.dataset.pipeline[2].scale == (64, 32)
    assert config.optim_wrapper.clip_grad == {"max_norm": 1}
    assert config.optim_wrapper.optimizer.nesterov is True
    assert config.model.decode_head.loss_decode.class_weight == [1, 2]


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("optim_wraper.optimizer.lr=1", "there is no optim_wraper: did you mean optim_wrapper?"),
        ("optim_wrapper.optimiser.lr=1", "there is no optimiser: did you mean optimizer?"),
        ("train_dataloader.batchsize=1", "there is no batchsize: did you mean batch_size?"),
        ("train_dataloader.dataset.indexes=4", "there is no indexes: did you mean indices?"),
        ("model.decode_head.num_class=3", "there is no num_class: did you mean num_classes?"),
        ("optim_wrapper.clip_grad.max_nrm=1", "there is no max_nrm: did you mean max_norm?"),
        ("default_hooks.checkpont.interval=4", "no checkpont: did you mean checkpoint?"),
        ("model.test_cfg.mod=whole", "there is no mod: did you mean mode?"),
        ("param_scheduler.5.end=1", "there is no 5; there are 0, 1"),
        ("log_level.x=3", "log_level is 'INFO' and has no x"),
    ],
)
def test_a_setting_that_names_nothing_is_refused_with_the_nearest_name(setting, hint):
    with pytest.raises(UsageError) as error:
        change(setting)
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "right"), [("crop_size=32", "--crop-size"), ("data_root=x", "--data-path")]
)
def test_a_variable_of_the_config_that_nothing_reads_any_more_is_refused(setting, right):
    with pytest.raises(UsageError, match=f"would change nothing.*{right}"):
        change(setting)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [1, 2", "cannot be read: while parsing a flow sequence"),
        ("- 1\n- 2\n", "cannot be read"),
        ("model: 3\n", "lacks model, train_dataloader, val_dataloader, test_dataloader"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        options.read_config(train.parse_args([str(path)]))
    assert words in str(error.value) and "\n" not in str(error.value)
