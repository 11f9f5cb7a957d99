"""The page of a proof: tables with mean and spread, a figure, reconstructions."""

import argparse
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from torch import nn
from torchvision.utils import save_image

from benchmarks.proof.arms import ARMS, CLAIMS, Arm
from benchmarks.proof.book import Book, Results
from util.run.logger import markdown_table
from util.run.pictures import load_samples, reconstruct, triples_grid

MEASURES = {
    "knn_last": "k-NN, last",
    "knn_scales": "k-NN, scales",
    "regression_last": "regression, last",
    "regression_scales": "regression, scales",
}
# A difference counts if it is so many standard errors from zero.
ERRORS = 2
# Arms of the four lines for a README.
HEADLINE = ("random", "mae", "convmae", "fast_cost")
# The reconstructions, in the output folder.
PICTURE = "reconstruction.png"


def verdicts(results: Results, arm: str, measure: str) -> dict[int, dict]:
    """The verdicts by seed, as `verdict_of` gave them, of one of `MEASURES` or a fine-tuning."""
    found = {}
    for seed, jobs in results.get(arm, {}).items():
        of = jobs if measure.startswith("finetune") else jobs.get("probe", {})
        if measure in of:
            found[seed] = of[measure]
    return found


def values(results: Results, arm: str, measure: str) -> dict[int, float]:
    """Accuracies in percent by seed."""
    return {s: found["accuracy"] for s, found in verdicts(results, arm, measure).items()}


def spread(numbers: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation; the number alone if there is one, "–" if there is none."""
    if not numbers:
        return "–"
    text = format(mean(numbers), form)
    return f"{text} ± {stdev(numbers):{form}}" if len(numbers) > 1 else text


def measures_of(shares: Sequence[float]) -> dict[str, str]:
    """Measures and their column heads."""
    return MEASURES | {f"finetune-{share:g}": f"fine-tuned, {share:g} %" for share in shares}


def count_measured(results: Results, arm: str, shares: Sequence[float]) -> int:
    """The number of seeds of an arm of which all is there that its row shows."""
    names = {"probe", *(f"finetune-{share:g}" for share in ARMS[arm].shares(shares))}
    return sum(names <= jobs.keys() for jobs in results.get(arm, {}).values())


def not_done(results: Results, setting: Mapping[str, object], shares: Sequence[float]) -> str:
    """The arms that an experiment has asked for and not measured with all seeds; "" if none."""
    parts = []
    for name, seeds in setting.get("asked", {}).items():
        left = seeds - count_measured(results, name, shares)
        if left > 0:
            parts.append(f"{ARMS[name].what} ({left} of {seeds} seeds)")
    return ", ".join(parts)


def with_seeds(cells: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The cells of a row, those of fewer seeds than the most with their number."""
    most = max(seeds)
    return [f"{c} ({n})" if 0 < n < most else c for c, n in zip(cells, seeds, strict=True)]


def spreads(columns: Sequence[Sequence[float]]) -> list[str]:
    """`spread` of each column of a row, see `with_seeds`."""
    return with_seeds(list(map(spread, columns)), list(map(len, columns)))


def accuracy_table(results: Results, shares: Sequence[float]) -> str:
    """Every arm's accuracies in percent, and the costs of its pretraining."""
    measures = measures_of(shares)
    rows = [["arm", "seeds", "epochs", "MFLOP", *measures.values(), "s an epoch"]]
    for name, arm in ARMS.items():
        if name not in results:
            continue
        trained = [jobs["pretrain"] for jobs in results[name].values() if "pretrain" in jobs]
        epochs = str(trained[0]["epochs"]) if trained else "0"
        cost = f"{trained[0]['mflops']:.0f}" if trained else "–"
        seconds = [job["seconds_an_epoch"] for job in trained if job["seconds_an_epoch"]]
        columns = [list(values(results, name, measure).values()) for measure in measures]
        seeds = str(max(map(len, columns)))
        rows.append([arm.what, seeds, epochs, cost, *spreads([*columns, seconds])])
    return markdown_table(rows)


def headline(results: Results, shares: Sequence[float]) -> str:
    """The table in four lines, for a README: fine-tuning and features of the first arms."""
    measures = measures_of(shares)
    shown = [name for name in measures if name.startswith("finetune")] + ["regression_scales"]
    rows = [["encoder", *(measures[name] for name in shown)]]
    for name in HEADLINE:
        if name in results:
            columns = [list(values(results, name, measure).values()) for measure in shown]
            rows.append([ARMS[name].what, *spreads(columns)])
    return markdown_table(rows)


def difference(
    results: Results, better: tuple[str, str], worse: tuple[str, str]
) -> tuple[float, float] | None:
    """The paired difference of two arms and its standard error, in percent points.

    Two errors are added as independent ones are: that of the pictures, each judged by both arms
    and by all seeds, and that of the seeds, if there are several.

    Args:
        results: of all arms.
        better: name of an arm, and measure.
        worse: likewise.

    Returns:
        None if there is no seed of both.
    """
    a, b = verdicts(results, *better), verdicts(results, *worse)
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    # [seeds, pictures]: 1 where the better arm alone is right, -1 where the worse one alone is.
    pairs = np.stack([bits(a[seed]) - bits(b[seed]) for seed in seeds])
    error = pairs.mean(axis=0).std() / math.sqrt(pairs.shape[1])
    if len(seeds) > 1:
        of_seeds = pairs.mean(axis=1).std(ddof=1) / math.sqrt(len(seeds))
        error = math.hypot(error, of_seeds)
    change = mean(a[seed]["accuracy"] - b[seed]["accuracy"] for seed in seeds)
    return change, 100 * float(error)


def bits(verdict: Mapping[str, object]) -> np.ndarray:
    """The pictures of a `verdict_of` that are right as 1, the others as 0: `[n]`, int8."""
    packed = np.frombuffer(bytes.fromhex(verdict["right"]), np.uint8)
    return np.unpackbits(packed, count=verdict["pictures"]).astype(np.int8)


def verdict(change: float, error: float) -> str:
    """A difference in words: which direction, or that there is none to be seen."""
    if abs(change) <= ERRORS * error:
        return "no difference"
    return "**as the paper**" if change > 0 else "**the other way**"


def claims_table(results: Results, shares: Sequence[float]) -> str:
    """Each claim of the paper beside what was found: points of difference ± standard error."""
    measures = {
        name: head for name, head in measures_of(shares).items() if not name.startswith("knn")
    }
    rows = [["comparison", "the paper", *measures.values()]]
    for claim in CLAIMS:
        pairs = [((claim.better, m), (claim.worse, m)) for m in measures]
        found = [difference(results, *pair) for pair in pairs]
        if any(found):
            cells = [f"{d[0]:+.1f} ± {d[1]:.1f}: {verdict(*d)}" if d else "–" for d in found]
            seeds = [len(values(results, *a).keys() & values(results, *b)) for a, b in pairs]
            pair = f"{ARMS[claim.better].what} − {ARMS[claim.worse].what}"
            rows.append([pair, claim.says, *with_seeds(cells, seeds)])
    return markdown_table(rows) if len(rows) > 1 else "No two arms to compare yet."


def curve_of(jobs: Mapping[str, Mapping]) -> dict[int, float]:
    """Accuracy of k-NN on all scales by epochs of pretraining, the last one included."""
    if "pretrain" not in jobs or "probe" not in jobs:
        return {}
    points = jobs.get("curve", {}).get("points", {})
    found = {int(epochs): accuracy for epochs, accuracy in points.items()}
    return found | {jobs["pretrain"]["epochs"]: jobs["probe"]["knn_scales"]["accuracy"]}


def draw_figure(results: Results, shares: Sequence[float], path: Path) -> None:
    """Bars with spread of every arm, and k-NN against the epochs of pretraining."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in ARMS if values(results, name, "regression_scales")]
    size = (11, max(4.5, 0.4 * len(names)))
    figure, (bars, lines) = plt.subplots(1, 2, figsize=size, layout="constrained")
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
        curves = [curve for jobs in results[name].values() if (curve := curve_of(jobs))]
        epochs = sorted(set.intersection(*map(set, curves))) if curves else []
        if len(epochs) > 1:
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


def position_table(results: Results) -> str:
    """A sentence on features of the last block without the position table; "" if not measured."""
    measure, parts = "regression_last", []
    for name, arm in ARMS.items():
        if found := difference(results, (name, f"{measure}_bare"), (name, measure)):
            bare, whole = (values(results, name, m) for m in (f"{measure}_bare", measure))
            parts.append(
                f"{arm.what} {mean(bare.values()):.1f} % instead of {mean(whole.values()):.1f} % "
                f"({found[0]:+.1f} ± {found[1]:.1f})"
            )
    if not parts:
        return ""
    return (
        f"Without the position table, set to zero after pretraining, the regression on the last "
        f"block is right in: {'; '.join(parts)}."
    )


def write_page(page: Path, book: Book) -> None:
    """Write the page and, beside it, its pictures.

    Args:
        page: the Markdown file.
        book: the results so far; the reconstructions lie beside them.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    results, settings, setting = book.found, book.settings, book.setting
    shares, counts = [float(share) for share in settings["finetunings"]], setting["counts"]
    figure = page.with_name("proof.png")
    draw_figure(results, shares, figure)
    labels = ", ".join(f"{share:g} % = {counts[f'labels-{share:g}']}" for share in shares)
    judged = "training pictures held out" if settings["tune"] else "test pictures"
    several = f", {setting['jobs']} jobs at a time" if setting["jobs"] > 1 else ""
    beside = " with the other jobs beside" if several else ""
    depth = " ".join(map(str, setting["depth"]))
    lines = [
        "# The paper's claims, replayed small",
        "",
        "Tables and pictures are made by the command below; a longer run replaces them.",
        "",
        f"Pretrained on {counts['all']} pictures of {setting['classes']} classes, without their "
        f"labels, {settings['epochs']} epochs, {setting['size']} pixels, model "
        f"{settings['model']} (ConvViT blocks and decoder of that size, {depth} blocks in the "
        f"stages, strides {setting['strides']}); judged by {counts['test']} {judged}. That is "
        f"little: ImageNet has 1.28 million pictures, the paper's runs 400 to 1600 epochs, and its "
        f"base model 100 times the parameters of tiny. The numbers say what happens at this size, "
        f"no more.",
        "",
        "Frozen features are means over the tokens, normalised token by token, then standardised: "
        "of the last block, or of all scales concatenated (the three stages; of a plain ViT the "
        "first, middle and last block). k-NN: 20 neighbours, cosine; regression: scikit-learn's "
        f"logistic regression, C = 1. Fine-tuning with {labels or 'no'} labelled pictures, the "
        f"accuracy of the last epoch. Peak learning rates {settings['lr']:g} and, in fine-tuning, "
        f"{settings['finetune_lr']:g} at batches of {settings['batch_size']}, the same for all "
        f"arms; layer decay 0.8, for random weights none. ± is the standard deviation over seeds, "
        f"whose number stands in brackets where it is less than the row's. "
        f"MFLOP are those of a picture in pretraining, forward and backward; seconds are on a CPU "
        f"the processor's, on a GPU the clock's{beside}. The arms without masked convolution and "
        f"with masks of stage 1 compute everything, masked or not. The teacher of MR-MCMAE is the "
        f"ConvViT trained from random weights with all labels, so that arm has seen them.",
        "",
        accuracy_table(results, shares),
        "",
        position_table(results),
        "",
        "## Beside the paper",
        "",
        "Points of difference, paired by seed and picture, ± standard error: that of the pictures "
        "and that of the seeds, which are few, together. Within "
        f"{ERRORS} errors of zero it reads no difference. Seeds in brackets as above.",
        "",
        claims_table(results, shares),
        "",
        f"![Accuracies, and accuracy against epochs]({figure.name})",
        "",
    ]
    arms = [jobs for seeds in results.values() for jobs in seeds.values()]
    drawn = [jobs["picture"] for jobs in arms if "picture" in jobs]
    source = book.path.with_name(PICTURE)
    if drawn and source.exists():
        picture = page.with_name("proof_reconstruction.png")
        shutil.copyfile(source, picture)
        lines += [f"![Reconstructions]({picture.name})", "", f"*{drawn[0]['caption']}*", ""]
    environment, missing = setting["environment"], not_done(results, setting, shares)
    lines += [
        "## How it was run",
        "",
        *(f"- {name}: {text}" for name, text in environment.items() if name != "command"),
        f"- time: {duration(book.seconds)}{several}, on a machine that may have done other work",
        *([f"- not done: {missing}"] if missing else []),
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
