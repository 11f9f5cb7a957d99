"""The page of a proof: tables with mean and spread, a figure, reconstructions."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from torch import nn
from torchvision.utils import save_image

from benchmarks.proof.arms import ARMS, CLAIMS, Arm
from util.run.logger import markdown_table
from util.run.pictures import load_samples, reconstruct, triples_grid

# Results of an arm: for each seed what its jobs found, by the name of the job.
Results = Mapping[str, Mapping[int, Mapping[str, Mapping]]]
MEASURES = {
    "knn_last": "k-NN, last",
    "knn_scales": "k-NN, scales",
    "regression_last": "regression, last",
    "regression_scales": "regression, scales",
}
# A difference counts if it is so many standard errors from zero.
ERRORS = 2


def value(jobs: Mapping[str, Mapping], measure: str) -> float | None:
    """The result of an arm and seed, in percent: one of `MEASURES`, or a fine-tuning."""
    if measure.startswith("finetune"):
        return jobs.get(measure, {}).get("accuracy")
    return jobs.get("probe", {}).get(measure)


def values(results: Results, arm: str, measure: str) -> dict[int, float]:
    """The same of every seed that has it."""
    found = {seed: value(jobs, measure) for seed, jobs in results.get(arm, {}).items()}
    return {seed: number for seed, number in found.items() if number is not None}


def spread(numbers: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation; the number alone if there is one, "–" if there is none."""
    if not numbers:
        return "–"
    text = format(mean(numbers), form)
    return f"{text} ± {stdev(numbers):{form}}" if len(numbers) > 1 else text


def measures_of(shares: Sequence[float]) -> dict[str, str]:
    """Measures and their column heads."""
    return MEASURES | {f"finetune-{share:g}": f"fine-tuned, {share:g} %" for share in shares}


def accuracy_table(results: Results, shares: Sequence[float]) -> str:
    """Every arm's accuracies in percent, and the seconds of an epoch of its pretraining."""
    measures = measures_of(shares)
    rows = [["arm", "seeds", "epochs", *measures.values(), "s an epoch"]]
    for name, arm in ARMS.items():
        if name not in results:
            continue
        cells = [spread(list(values(results, name, m).values())) for m in measures]
        trained = [jobs["pretrain"] for jobs in results[name].values() if "pretrain" in jobs]
        epochs = str(trained[0]["epochs"]) if trained else "0"
        seconds = [job["seconds_an_epoch"] for job in trained if job["seconds_an_epoch"]]
        seeds = str(len(results[name]))
        rows.append([arm.what, seeds, epochs, *cells, spread(seconds)])
    return markdown_table(rows)


def difference(
    results: Results, better: str, worse: str, measure: str, tests: int
) -> tuple[float, float] | None:
    """The paired difference of two arms and its standard error, in percent points.

    The error is the larger of two: that of the seeds (if there are several), and that of judging
    by `tests` pictures as if they were others for each arm. None if there is no seed of both.
    """
    a, b = values(results, better, measure), values(results, worse, measure)
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    if not pairs:
        return None
    differences = [x - y for x, y in pairs]
    variances = (p / 100 * (1 - p / 100) / tests for p in map(mean, zip(*pairs, strict=True)))
    error = 100 * sum(variances) ** 0.5
    if len(pairs) > 1:
        error = max(error, stdev(differences) / len(pairs) ** 0.5)
    return mean(differences), error


def verdict(change: float, error: float) -> str:
    """A difference in words: which direction, or that there is none to be seen."""
    if abs(change) <= ERRORS * error:
        return "no difference"
    return "**as the paper**" if change > 0 else "**the other way**"


def claims_table(results: Results, shares: Sequence[float], tests: int) -> str:
    """Each claim of the paper beside what was found: points of difference ± standard error."""
    measures = {
        name: head for name, head in measures_of(shares).items() if not name.startswith("knn")
    }
    rows = [["comparison", "the paper", *measures.values()]]
    for claim in CLAIMS:
        found = [difference(results, claim.better, claim.worse, m, tests) for m in measures]
        if any(found):
            cells = [f"{d[0]:+.1f} ± {d[1]:.1f}: {verdict(*d)}" if d else "–" for d in found]
            pair = f"{ARMS[claim.better].what} − {ARMS[claim.worse].what}"
            rows.append([pair, claim.says, *cells])
    return markdown_table(rows) if len(rows) > 1 else "No two arms to compare yet."


def curve_of(jobs: Mapping[str, Mapping]) -> dict[int, float]:
    """Accuracy of k-NN on all scales by epochs of pretraining, the last one included."""
    if "pretrain" not in jobs or "probe" not in jobs:
        return {}
    points = jobs.get("curve", {}).get("points", {})
    found = {int(epochs): point["knn_scales"] for epochs, point in points.items()}
    return found | {jobs["pretrain"]["epochs"]: jobs["probe"]["knn_scales"]}


def draw_figure(results: Results, shares: Sequence[float], path: Path) -> None:
    """Bars with spread of every arm, and k-NN against the epochs of pretraining."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, lines) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = [name for name in ARMS if values(results, name, "regression_scales")]
    shown = {"regression_scales": "logistic regression, all scales"}
    if shares:
        shown |= {f"finetune-{s:g}": f"fine-tuned with {s:g} % of the labels" for s in shares}
    height = 0.8 / len(shown)
    for place, (measure, label) in enumerate(shown.items()):
        found = {i: list(values(results, name, measure).values()) for i, name in enumerate(names)}
        found = {i: numbers for i, numbers in found.items() if numbers}
        bars.barh(
            [i + (place - (len(shown) - 1) / 2) * height for i in found],
            [mean(numbers) for numbers in found.values()],
            height,
            xerr=[stdev(n) if len(n) > 1 else 0 for n in found.values()],
            label=label,
        )
    bars.set_yticks(range(len(names)), [ARMS[name].what for name in names])
    bars.invert_yaxis()
    bars.set_xlabel("accuracy on pictures never seen, %")
    figure.legend(loc="outside upper left", ncols=2, fontsize="small")
    for name in names:
        curves = [curve_of(jobs) for jobs in results[name].values()]
        epochs = sorted(set.intersection(*map(set, curves)))
        if epochs:
            means = [mean(curve[epoch] for curve in curves) for epoch in epochs]
            lines.plot(epochs, means, marker="o", label=ARMS[name].what)
    lines.set(xlabel="epochs of pretraining", ylabel="k-NN, all scales, %")
    if lines.lines:
        lines.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_reconstructions(
    model: nn.Module, arm: Arm, args: argparse.Namespace, data: Path, path: Path
) -> str:
    """Write original, masked and filled of twelve held-out pictures; return the caption.

    Args:
        model: of a pretraining.
        arm: whose it is.
        args: completed arguments of that pretraining.
        data: with `val/`, over which the pictures are spread evenly: none is chosen.
        path: of the picture.
    """
    imgs = load_samples(data, args.input_size, args.in_chans, count=256)
    twelve = reconstruct(model, imgs[:: max(1, len(imgs) // 12)][:12], args.mask_ratio)
    save_image(triples_grid(twelve), path)
    found, given = reconstruct(model, imgs, args.mask_ratio), ""
    if found.means_given:
        given = " Mean and contrast of each patch are the original's: the model predicts the rest."
    return (
        f"Pictures never seen: original, {args.mask_ratio:.0%} removed, filled in ({arm.what}, "
        f"{args.epochs} epochs, spread evenly over the test pictures).{given} On "
        f"{len(imgs)} test pictures: {found.errors}."
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


def write_page(
    page: Path,
    results: Results,
    settings: Mapping[str, object],
    environment: Mapping[str, str],
    draw: Callable[[Path], str] | None,
) -> None:
    """Write the page and, beside it, its pictures.

    Args:
        page: the Markdown file.
        results: of all arms so far.
        settings: of the experiment, see `settings_of` of the program.
        environment: hardware, versions and command.
        draw: writes the reconstructions to a path and returns their caption; None without any.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    shares, counts = settings["shares"], settings["counts"]
    figure = page.with_name("proof.png")
    draw_figure(results, shares, figure)
    arms = [jobs for seeds in results.values() for jobs in seeds.values()]
    seconds = sum(job["seconds"] for jobs in arms for job in jobs.values())
    labels = ", ".join(f"{share:g} % = {counts[f'labels-{share:g}']}" for share in shares)
    judged = "training pictures held out" if settings["tune"] else "test pictures"
    lines = [
        "# The paper's claims, replayed small",
        "",
        "Written by the command below; a longer run replaces it.",
        "",
        f"Pretrained on {counts['all']} pictures of {settings['classes']} classes, without their "
        f"labels, {settings['epochs']} epochs, {settings['size']} pixels, model "
        f"{settings['model']} (ConvViT blocks and decoder of that size, strides "
        f"{settings['strides']}); judged by {counts['test']} {judged}. That is little: ImageNet "
        f"has 1.28 million pictures, the paper's runs 400 to 1600 epochs, and its base model 100 "
        f"times the parameters of tiny. The numbers say what happens at this size, no more.",
        "",
        "Frozen features are means over the tokens, normalised token by token, then standardised: "
        "of the last block, or of all scales concatenated (the three stages; of a plain ViT the "
        "first, middle and last block). k-NN: 20 neighbours, cosine; regression: scikit-learn's "
        f"logistic regression, C = 1. Fine-tuning with {labels or 'no'} labelled pictures, the "
        "accuracy of the last epoch. ± is the standard deviation over seeds. Seconds are the "
        "processor's, which other work changes least (on a GPU the clock's); the arms without "
        "masked convolution and with masks of stage 1 compute everything, masked or not.",
        "",
        accuracy_table(results, shares),
        "",
        "## Beside the paper",
        "",
        "Points of difference, paired by seed, ± standard error: the larger of that over seeds "
        f"and that of judging by {counts['test']} pictures. Within {ERRORS} errors of zero it "
        "reads no difference.",
        "",
        claims_table(results, shares, counts["test"]),
        "",
        f"![Accuracies, and accuracy against epochs]({figure.name})",
        "",
    ]
    if draw:
        picture = page.with_name("proof_reconstruction.png")
        caption = draw(picture)
        lines += [f"![Reconstructions]({picture.name})", "", f"*{caption}*", ""]
    lines += [
        "## How it was run",
        "",
        *(f"- {name}: {text}" for name, text in environment.items() if name != "command"),
        f"- time: {duration(seconds)} for all of it, of a machine that may have done other work",
        "",
        "```",
        environment["command"],
        "```",
        "",
    ]
    text = "\n".join(lines)
    temporary = page.with_name(f"{page.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, page)
