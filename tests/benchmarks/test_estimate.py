import pytest

from benchmarks.estimate import Estimate, estimate, main, overlapped, ring_seconds


def test_hours_follow_from_images_a_second():
    assert estimate(1000, epochs=36, images=100_000, gpus=1) == Estimate(1.0, 1.0)
    assert estimate(1000, epochs=36, images=100_000, gpus=8) == Estimate(1 / 8, 1.0)
    assert estimate(1000, 36, 100_000, 8, efficiency=0.5) == Estimate(1 / 4, 2.0)


def cells(printed: str) -> list[list[str]]:
    """Rows of the tables, without their heads."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if not row[0].startswith(("images", "-"))]


def test_the_published_run_on_imagenet(capsys):
    main(["--images_per_s", "2000", "--gpus", "8", "--epochs", "400"])
    printed = capsys.readouterr().out
    assert "arithmetic, not measured: 1,281,167 images an epoch" in printed
    assert cells(printed) == [["2000", "8", "1", "400", "8.9 h", "71"]]


def test_long_runs_are_given_in_days_too(capsys):
    main(["--images_per_s", "100", "--epochs", "1600"])
    assert "711.8 h (29.7 days)" in capsys.readouterr().out


def test_a_ring_sends_all_gradients_twice_but_for_one_share():
    # 8 GPUs: 7 steps of reducing and 7 of gathering, an eighth of the gradients each.
    assert ring_seconds(800, 8, 10) == pytest.approx(14 * 100 / 10)
    assert ring_seconds(800, 1, 10) == 0


def test_what_the_backward_pass_hides_costs_nothing():
    assert overlapped(step=0.3, reduce=0.1) == (pytest.approx(0.75), 1)
    assert overlapped(step=0.3, reduce=0.5) == (pytest.approx(0.375), pytest.approx(0.5))


def test_beyond_a_node_the_network_is_what_counts(capsys):
    links = ["--node_gb_per_s", "460", "--network_gb_per_s", "46"]
    step = ["--gradient_mb", "460", "--batch_size", "100"]
    main(["--images_per_s", "1000", "--gpus", "8", "16", "--epochs", "400", *links, *step])
    # Steps of 100 ms; all-reduces of 2 * 7/8 ms and of 2 * 15/16 * 10 ms.
    shares = [row[2] for row in cells(capsys.readouterr().out)]
    assert shares == ["0.983 – 1", "0.842 – 1"]


def test_cores_that_feed_a_gpu_are_whole_ones(capsys):
    main(["--images_per_s", "1000", "500", "--loader_images_per_s", "500", "300", "--epochs", "1"])
    assert cells(capsys.readouterr().out)[2:] == [["1000", "2", "4"], ["500", "1", "2"]]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "--images_per_s"),
        (["--images_per_s", "0"], "must be above 0"),
        (["--images_per_s", "5", "--efficiency", "0"], "--efficiency must be above 0"),
        (["--images_per_s", "5", "--gradient_mb", "9"], "needs --batch_size and --node_gb_per_s"),
        (
            ["--images_per_s", "5", "--gradient_mb", "9", "--batch_size", "2", "--gpus", "16"],
            "needs --network_gb_per_s",
        ),
        (["--images_per_s", "5", "--batch_size", "9"], "says nothing without --gradient_mb"),
        (
            ["--images_per_s", "5", "--gradient_mb", "9", "--efficiency", "0.9"],
            "--efficiency and --gradient_mb: give one of them",
        ),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options, complaint, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(options)
    assert refusal.value.code == 2
    complaints = capsys.readouterr().err
    assert complaint in complaints and len(complaints.splitlines()) == 1
