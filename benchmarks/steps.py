"""Forms of a step, of training or inference, and their costs beside each other."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import (
    environment,
    median_and_range,
    print_environment,
    ratios,
    step_time,
    time_rounds,
)
from util.errors import UsageError
from util.run.distributed import use_fast_kernels
from util.run.logger import markdown_table
from util.run.optim_step import amp_dtype
from util.run.parser import Parser, positive_int

WARMUP_STEPS = 2
# glibc then gives all larger blocks back as soon as they are free, so that resident memory is what
# was needed at once, not what fragments added to it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
AMP = ("auto", "none", "bf16", "fp16")
# Dense matrix products in bfloat16 or float16 (vendor's data sheets), in TFLOP/s.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "V100": 125}


@dataclass(frozen=True)
class Form:
    """One way to compute a step, such as `dense` or `dense:eager:fp16`.

    Attributes:
        name: as given.
        base: which model.
        compile: whether it is compiled.
        dtype: autocast type.
    """

    name: str
    base: str
    compile: bool
    dtype: torch.dtype | None

    @classmethod
    def of(cls, name: str, args: argparse.Namespace) -> "Form":
        """Read a form: what it does not say itself, `--compile` and `--amp` say.

        Raises:
            UsageError: neither a type nor "eager" behind a colon.
        """
        base, *options = name.split(":")
        compiled, amp = args.compile, args.amp
        for option in options:
            if option == "eager":
                compiled = False
            elif option in AMP:
                amp = option
            else:
                raise UsageError(f"--forms {name}: {option!r} must be eager, {', '.join(AMP)}")
        return cls(name, base, compiled, amp_dtype(amp, torch.device(args.device)))


@dataclass(frozen=True)
class Result:
    """Cost of a step of one form.

    Attributes:
        seconds: one entry a round.
        flops_per_image: floating-point operations of forward and backward.
        peak_memory: bytes over the idle model and optimizer; None where the system does not tell.
    """

    seconds: list[float]
    flops_per_image: int
    peak_memory: int | None


@dataclass(frozen=True)
class Benchmark:
    """A step that can be computed in several forms.

    Attributes:
        program: name of the module, for the command line.
        build: model of a form's base from the options; may raise a ValueError.
        batch: images and what else the loss takes, on the device.
        loss: from a form's base and its model, the options and a batch to a scalar; without
            training to whatever the model gives.
        bases: names of the forms; the first is compared with all others.
        more: names of forms that are run only if they are asked for.
        masks: from a model and the options to the masks of an image. Each counts as an image, so
            that the batch is as many times smaller.
        training: a step is forward, backward and AdamW; else forward alone, nothing kept.
    """

    program: str
    build: Callable[[str, argparse.Namespace], nn.Module]
    batch: Callable[[argparse.Namespace], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    bases: Sequence[str]
    more: Sequence[str] = ()
    masks: Callable[[nn.Module, argparse.Namespace], int] = lambda *_: 1
    training: bool = True


def add_step_args(parser: Parser, benchmark: Benchmark, sizes: Sequence[str], batch: int) -> None:
    """The options that all benchmarks of a step have."""
    add = parser.add_argument
    add("--model", default="base", choices=sizes, help="size of the model")
    add(
        "--forms",
        nargs="+",
        default=benchmark.bases,
        metavar="FORM",
        help=f"what to run: {', '.join([*benchmark.bases, *benchmark.more])}; with :eager and a "
        f"type such as :fp16 "
        f"for other settings than those of --compile and --amp",
    )
    add("--batch_size", type=positive_int, default=batch, metavar="N", help="images in a step")
    add(
        "--input_size",
        type=positive_int,
        default=224,
        metavar="PIXELS",
        help="side of the square images, a multiple of 16",
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
        choices=AMP,
        help="autocast type; auto: none on a CPU, bf16 on CUDA (fp16 where the GPU lacks it)",
    )
    add("--compile", action="store_true", help="torch.compile the models")
    add("--json", type=Path, metavar="FILE", help="write the results there, in seconds and bytes")
    add("--measure_memory", metavar="FORM", help=argparse.SUPPRESS)


def settle_options(args: argparse.Namespace, bases: Sequence[str]) -> None:
    """Check what the parser alone cannot, and settle what is left to `auto`.

    Raises:
        UsageError: an option that does not fit the others or the machine.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA GPU is visible; use --device cpu or auto")
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {args.json.parent}")
    args.forms = [Form.of(name, args) for name in args.forms]
    valued = {base.partition("=")[0] for base in bases if "=" in base}  # of any value
    for form in args.forms:
        name, equals, _ = form.base.partition("=")
        if form.base not in bases and not (equals and name in valued):
            raise UsageError(f"--forms: invalid choice: {form.base!r} (know {', '.join(bases)})")


def ready_step(benchmark: Benchmark, form: Form, args: argparse.Namespace) -> Callable[[], None]:
    """Model, optimizer and batch of a form; a call takes one optimizer step on them.

    Without training a call is a forward pass.
    """
    model = benchmark.build(form.base, args)
    compiled = torch.compile(model, dynamic=False) if form.compile else model  # fixed sizes
    images = args.batch_size // benchmark.masks(model, args)
    batch = [part[:images] for part in benchmark.batch(args)]
    loss = partial(benchmark.loss, form.base, compiled, args, *batch)
    if not benchmark.training:

        @torch.inference_mode()
        def forward() -> None:
            with torch.autocast(args.device, form.dtype, enabled=form.dtype is not None):
                loss()

        return forward
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    # The optimizer's memory is there from the beginning, as in the middle of a run.
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler(args.device, enabled=form.dtype == torch.float16)

    def step() -> None:
        with torch.autocast(args.device, form.dtype, enabled=form.dtype is not None):
            value = loss()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def conv_backward_flops(grad_out_shape, x_shape, w_shape, *args, out_shape) -> int:
    """FLOPs of a convolution's gradients: each wanted one of input and weight is a forward's.

    torch's own formula takes a depthwise convolution's weight gradient for a full one's.
    """
    *_, output_mask = args
    return sum(output_mask[:2]) * 2 * prod(grad_out_shape) * prod(w_shape[1:])


def count_flops(loss: Callable[[], Tensor], backward: bool = True) -> int:
    """Count the floating-point operations of a loss and its gradients, or of a forward pass.

    Matrix products and convolutions only. Attention runs in its unfused form for this: torch has
    no formula for the CPU's fused one, and the count shall not depend on the device.
    """
    formulas = {torch.ops.aten.convolution_backward: conv_backward_flops}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        if backward:
            loss().backward()
        else:
            with torch.no_grad():
                loss()
    return counter.get_total_flops()


def flops_of(benchmark: Benchmark, form: Form, args: argparse.Namespace) -> int:
    """Floating-point operations of a step on one image, or on one of its masks.

    Raises:
        ValueError: a batch that the number of masks does not divide.
    """
    one = [part[:1] for part in benchmark.batch(args)]
    model = benchmark.build(form.base, args)
    masks = benchmark.masks(model, args)
    if args.batch_size % masks:
        raise ValueError(
            f"--batch_size {args.batch_size} must be a multiple of {masks}, the masks of an image "
            f"in the form {form.name}"
        )
    loss = partial(benchmark.loss, form.base, model, args, *one)
    return count_flops(loss, benchmark.training) // masks


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} in /proc/self/status")


def measure_memory(step: Callable[[], None], device: str) -> int | None:
    """Peak memory in bytes of two steps, over what is there before.

    On CUDA what torch allocates. On a CPU resident memory, so for a fresh process only, with the
    compiler's own if the step is compiled in it.
    """
    cuda = device == "cuda"
    if not cuda and sys.platform != "linux":
        return None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    idle = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
    for _ in range(2):
        step()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    return peak - idle


def measure_memory_afresh(program: str, form: Form, argv: Sequence[str]) -> int | None:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{program}", *argv, "--measure_memory", form.name]
    process = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | MALLOC, check=True)
    return json.loads(process.stdout)


def measure(
    benchmark: Benchmark, args: argparse.Namespace, argv: Sequence[str]
) -> dict[str, Result]:
    """Measure every form.

    Raises:
        UsageError: the model refuses the options.
    """
    try:
        flops = {form.name: flops_of(benchmark, form, args) for form in args.forms}
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.device == "cpu":
        memory = {f.name: measure_memory_afresh(benchmark.program, f, argv) for f in args.forms}
    steps = {form.name: ready_step(benchmark, form, args) for form in args.forms}
    if args.device == "cuda":
        memory = {name: measure_memory(step, args.device) for name, step in steps.items()}
    seconds = time_rounds(steps, args.rounds, step_time(args.device), WARMUP_STEPS)
    return {name: Result(seconds[name], flops[name], memory[name]) for name in steps}


def compare(results: Mapping[str, Result]) -> dict[str, dict[str, object]]:
    """Ratios of the first form to each other; of times, one entry a round."""
    first, *others = results
    return {
        f"{first} / {other}": {
            "seconds": ratios(results[first].seconds, results[other].seconds),
            "flops": results[first].flops_per_image / results[other].flops_per_image,
            "peak_memory": _ratio(results[first].peak_memory, results[other].peak_memory),
        }
        for other in others
    }


def _ratio(a: int | None, b: int | None) -> float | None:
    return a / b if a and b else None


def utilisation(result: Result, batch_size: int, hardware: str) -> str:
    """TFLOP/s, and their share of what the hardware can do at the most, where that is known."""
    rate = result.flops_per_image * batch_size / median(result.seconds) / 1e12
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if name in hardware]
    return f"{rate:.3g}" + (f" ({rate / peaks[0]:.0%})" if peaks else "")


def table(results: Mapping[str, Result], batch_size: int, hardware: str) -> str:
    """All results and their ratios as an aligned Markdown table."""
    head = ["form", "s/step (min–max)", "images/s", "peak MiB", "GFLOP/image", "TFLOP/s"]
    rows = [head]
    for name, result in results.items():
        memory = "–" if result.peak_memory is None else f"{result.peak_memory / 2**20:.0f}"
        images = f"{batch_size / median(result.seconds):.3g}"
        gflops = f"{result.flops_per_image / 1e9:.3g}"
        used = utilisation(result, batch_size, hardware)
        rows.append([name, median_and_range(result.seconds), images, memory, gflops, used])
    for name, ratio in compare(results).items():
        memory = "–" if ratio["peak_memory"] is None else f"{ratio['peak_memory']:.3g}"
        rows.append(
            [name, median_and_range(ratio["seconds"]), "", memory, f"{ratio['flops']:.3g}", ""]
        )
    return markdown_table(rows)


def report(benchmark: Benchmark, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure, print, and write the file if one is wanted."""
    surroundings = environment(benchmark.program, argv, args.device)
    dtypes = {form.name: str(form.dtype or torch.float32) for form in args.forms}
    named = [f"{name} {dtype.removeprefix('torch.')}" for name, dtype in dtypes.items()]
    surroundings["precision"] = ", ".join(named)
    print_environment(surroundings)
    results = measure(benchmark, args, argv)
    print(f"\n{table(results, args.batch_size, surroundings['hardware'])}")
    if args.json:
        content = {
            "environment": surroundings,
            "batch_size": args.batch_size,
            "forms": {name: asdict(result) for name, result in results.items()},
            "ratios": compare(results),
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def run(benchmark: Benchmark, parser: Parser, argv: Sequence[str]) -> None:
    """Run a benchmark; a bad option is one line and exit status 2."""
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        settle_options(args, [*benchmark.bases, *benchmark.more])
        if args.device == "cuda":
            use_fast_kernels()
        if args.measure_memory:
            form = Form.of(args.measure_memory, args)
            print(json.dumps(measure_memory(ready_step(benchmark, form, args), args.device)))
        else:
            report(benchmark, args, argv)
    except UsageError as error:
        parser.error(str(error))
