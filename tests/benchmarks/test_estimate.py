import pytest

from benchmarks.estimate import Estimate, estimate, main


def test_hours_follow_from_images_a_second():
    assert estimate(1000, epochs=36, images=100_000, gpus=1) == Estimate(1.0, 1.0)
    assert estimate(1000, epochs=36, images=100_000, gpus=8) == Estimate(1 / 8, 1.0)
    assert estimate(1000, 36, 100_000, 8, efficiency=0.5) == Estimate(1 / 4, 2.0)


def test_the_published_run_on_imagenet(capsys):
    main(["--images_per_s", "2000", "--gpus", "8", "--epochs", "400"])
    printed = capsys.readouterr().out
    assert "1,281,167 images an epoch, 8 GPUs of 2000 images/s each, efficiency 1" in printed
    assert "| 400    | 8.9 h | 71        |" in printed


def test_long_runs_are_given_in_days_too(capsys):
    main(["--images_per_s", "100", "--epochs", "1600"])
    assert "711.8 h (29.7 days)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "--images_per_s"),
        (["--images_per_s", "0"], "must be above 0"),
        (["--images_per_s", "5", "--efficiency", "0"], "--efficiency must be above 0"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options, complaint, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(options)
    assert refusal.value.code == 2
    complaints = capsys.readouterr().err
    assert complaint in complaints and len(complaints.splitlines()) == 1
