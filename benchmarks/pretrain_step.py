"""Time, memory and arithmetic of one pretraining step: ConvMAE as here, as published, and MAE.

`python -m benchmarks.pretrain_step --help`, from the repository root. Three forms are compared in
one run, on random images, forward and backward without an optimizer:

- `visible`: this project's model, which computes the visible blocks only;
- `dense`: the same model as the original computes it;
- `mae`: a plain MAE ViT of the same width.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import DenseMaskedAutoencoder, PlainMaskedAutoencoder
from models_convmae import MODELS
from util.args import Parser, mask_ratio, positive_int
from util.errors import UsageError
from util.logger import markdown_table
from util.optim_step import amp_dtype

FORMS = ("visible", "dense", "mae")
RATIOS = (("visible", "dense"), ("visible", "mae"))
WARMUP_STEPS = 2

# The plain ViT beside each ConvMAE: width and heads of its stage 3, one block more, its decoder.
TINY_DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
MAE_SIZES = {
    "tiny": dict(embed_dim=128, depth=5, num_heads=2, **TINY_DECODER),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}


@dataclass(frozen=True)
class Result:
    """What a step of one form costs.

    Attributes:
        seconds: one entry a round.
        flops_per_image: floating-point operations of forward and backward.
        peak_memory: bytes over the idle model; None where the system does not tell.
    """

    seconds: list[float]
    flops_per_image: int
    peak_memory: int | None


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.pretrain_step",
        description="Compare one pretraining step (forward and backward, no optimizer) of ConvMAE "
        "on visible blocks, of dense ConvMAE and of a plain MAE: seconds, images/s, peak memory "
        "in MiB over the idle model, GFLOPs per image.",
    )
    add = parser.add_argument
    add("--model", default="base", choices=MAE_SIZES, help="size of ConvMAE and of its plain MAE")
    add("--forms", nargs="+", default=FORMS, choices=FORMS, help="what to run")
    add("--batch_size", type=positive_int, default=16, metavar="N", help="images in a step")
    add(
        "--input_size",
        type=positive_int,
        default=224,
        metavar="PIXELS",
        help="side of the square images, a multiple of 16",
    )
    add(
        "--mask_ratio",
        type=mask_ratio,
        default=0.75,
        metavar="SHARE",
        help="share of patches to remove",
    )
    add(
        "--rounds",
        type=positive_int,
        default=5,
        metavar="N",
        help=f"timed steps of each form, in turn, after {WARMUP_STEPS} to warm up",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA if present")
    add(
        "--amp",
        default="auto",
        choices=("auto", "none", "bf16", "fp16"),
        help="autocast type; auto: none on a CPU, bf16 on CUDA (fp16 where the GPU lacks it)",
    )
    add("--compile", action="store_true", help="torch.compile the models")
    add("--json", type=Path, metavar="FILE", help="write the results there, in seconds and bytes")
    add("--measure_memory", choices=FORMS, help=argparse.SUPPRESS)
    return parser


def complete(args: argparse.Namespace) -> None:
    """Check what the parser alone cannot, and settle what is left to `auto`.

    Raises:
        UsageError: an option that does not fit the others or the machine.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is visible; use --device cpu or auto")
    args.dtype = amp_dtype(args.amp, torch.device(args.device))
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    args.forms = [form for form in FORMS if form in args.forms]


def build(form: str, args: argparse.Namespace) -> nn.Module:
    """The model of one form, on its device.

    Raises:
        ValueError: the patch does not divide the input size.
    """
    if form == "mae":
        model = PlainMaskedAutoencoder(img_size=args.input_size, **MAE_SIZES[args.model])
    else:
        model = MODELS[f"convmae_convvit_{args.model}_patch16"](img_size=args.input_size)
    if form == "dense":
        model.__class__ = DenseMaskedAutoencoder  # the same module, computed the other way
    return model.to(args.device)


def random_images(args: argparse.Namespace) -> Tensor:
    """A batch `[N, 3, H, W]` of noise."""
    return torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device)


def step(model: nn.Module, imgs: Tensor, ratio: float, dtype: torch.dtype | None) -> None:
    """Forward and backward, in autocast to `dtype` if there is one."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(imgs.device.type, dtype, enabled=dtype is not None):
        loss, _, _ = model(imgs, ratio)
    loss.backward()


def ready_step(model: nn.Module, imgs: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """The step with everything bound that the options decide."""
    model = torch.compile(model, dynamic=False) if args.compile else model  # fixed sizes
    return partial(step, model, imgs, args.mask_ratio, args.dtype)


def conv_backward_flops(grad_out_shape, x_shape, w_shape, *args, out_shape) -> int:
    """FLOPs of a convolution's gradients: each wanted one of input and weight is a forward's.

    torch's own formula takes a depthwise convolution's weight gradient for a full one's.
    """
    *_, output_mask = args
    return sum(output_mask[:2]) * 2 * prod(grad_out_shape) * prod(w_shape[1:])


def count_flops(model: nn.Module, img: Tensor, ratio: float) -> int:
    """Count the floating-point operations of a step on one image `[1, 3, H, W]`.

    Matrix products and convolutions only. Attention runs in its unfused form for this: torch has
    no formula for the CPU's fused one, and the count shall not depend on the device.
    """
    formulas = {torch.ops.aten.convolution_backward: conv_backward_flops}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        step(model, img, ratio, None)
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status")


def measure_memory(form: str, args: argparse.Namespace) -> int | None:
    """Peak memory in bytes of two steps, over model and images. For a fresh process only.

    On a CPU that is resident memory, in which a process keeps what it has freed; with `--compile`
    the compiler's own is in it.
    """
    run = ready_step(build(form, args), random_images(args), args)
    cuda = args.device == "cuda"
    if not cuda and sys.platform != "linux":
        return None
    idle = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
    for _ in range(2):
        run()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    return peak - idle


def measure_memory_afresh(form: str, argv: Sequence[str]) -> int | None:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.pretrain_step", *argv, "--measure_memory", form]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def seconds_of(run: Callable[[], None], device: str) -> float:
    """Wall-clock time of one call, with all that it starts on the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def time_rounds(
    runs: dict[str, Callable[[], None]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Time every form once a round, each round starting with another, after warming up."""
    for run in runs.values():
        for _ in range(WARMUP_STEPS):
            run()
    forms, seconds = list(runs), {form: [] for form in runs}
    for number in range(rounds):
        first = number % len(forms)
        for form in forms[first:] + forms[:first]:
            seconds[form].append(seconds_of(runs[form], device))
    return seconds


def measure(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Result]:
    """Measure every form.

    Raises:
        UsageError: the model refuses the input size or the mask ratio.
    """
    imgs = random_images(args)
    try:
        models = {form: build(form, args) for form in args.forms}
        flops = {form: count_flops(m, imgs[:1], args.mask_ratio) for form, m in models.items()}
    except ValueError as error:
        raise UsageError(str(error)) from error
    memory = {form: measure_memory_afresh(form, argv) for form in args.forms}
    runs = {form: ready_step(model, imgs, args) for form, model in models.items()}
    seconds = time_rounds(runs, args.rounds, args.device)
    return {form: Result(seconds[form], flops[form], memory[form]) for form in args.forms}


def compare(results: dict[str, Result]) -> dict[str, dict[str, object]]:
    """The ratios of `RATIOS` whose two forms were run; of times, one entry a round."""
    ratios = {}
    for form, other in RATIOS:
        if form in results and other in results:
            a, b = results[form], results[other]
            ratios[f"{form} / {other}"] = {
                "seconds": [x / y for x, y in zip(a.seconds, b.seconds, strict=True)],
                "flops": a.flops_per_image / b.flops_per_image,
                "peak_memory": a.peak_memory / b.peak_memory if a.peak_memory else None,
            }
    return ratios


def environment(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, str]:
    """What a number is worth nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    cpu = f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "precision": str(args.dtype or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.pretrain_step", *argv]),
    }


def spread(values: Sequence[float]) -> str:
    """Median (minimum–maximum)."""
    return f"{median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def table(results: dict[str, Result], batch_size: int) -> str:
    """All results and their ratios as an aligned Markdown table."""
    rows = [["form", "s/step (min–max)", "images/s", "peak MiB", "GFLOP/image"]]
    for form, result in results.items():
        memory = "–" if result.peak_memory is None else f"{result.peak_memory / 2**20:.0f}"
        images = f"{batch_size / median(result.seconds):.3g}"
        gflops = f"{result.flops_per_image / 1e9:.3g}"
        rows.append([form, spread(result.seconds), images, memory, gflops])
    for name, ratio in compare(results).items():
        memory = "–" if ratio["peak_memory"] is None else f"{ratio['peak_memory']:.3g}"
        rows.append([name, spread(ratio["seconds"]), "", memory, f"{ratio['flops']:.3g}"])
    return markdown_table(rows)


def report(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, print, and write the file if one is wanted."""
    surroundings = environment(args, argv)
    print("\n".join(f"{name}: {value}" for name, value in surroundings.items()), flush=True)
    results = measure(args, argv)
    print(f"\n{table(results, args.batch_size)}")
    if args.json:
        content = {
            "environment": surroundings,
            "batch_size": args.batch_size,
            "forms": {form: asdict(result) for form, result in results.items()},
            "ratios": compare(results),
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str]) -> None:
    """Run; a bad option is one line and exit status 2."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        complete(args)
        if args.device == "cuda":
            torch.set_float32_matmul_precision("high")
        if args.measure_memory:
            print(json.dumps(measure_memory(args.measure_memory, args)))
        else:
            report(args, argv)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
