"""Memory kept for the backward pass by a compiled pretraining step, and its time.

`python -m benchmarks.memory_budget --help`, from the repository root. torch's compiler chooses
which activations to keep and which to compute again; `activation_memory_budget` bounds what it
keeps, as a share of what it would keep by itself. Beside it stands `--grad_checkpointing`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

from benchmarks.measuring import (
    environment,
    median_and_range,
    print_environment,
    ratios,
    step_time,
    time_rounds,
)
from models_convmae import MODELS, MaskedAutoencoderConvViT
from util.run.distributed import use_fast_kernels
from util.run.logger import markdown_table
from util.run.parser import Parser, positive_int, share


def kept_bytes(loss: Tensor, model: MaskedAutoencoderConvViT) -> int:
    """Bytes that a compiled loss keeps for its backward pass, beside the parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}
    for tensor in loss.grad_fn.saved_tensors:
        if tensor is not None and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


# The compiler's choice of what to keep, without code generated for it.
partition = aot_autograd(
    fw_compiler=boxed_nop,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=select_decomp_table(),
)


def ready_step(
    args: argparse.Namespace, budget: float, checkpointing: bool
) -> tuple[Callable[[], None], int]:
    """Compile a step; return what takes one, and the bytes it keeps."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[f"convmae_convvit_{args.model}_patch16"](img_size=args.input_size).to(device)
    model.set_grad_checkpointing(checkpointing)
    imgs = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        # One of its own for each form: models of one class share what one backend compiled.
        with compiler.patch(activation_memory_budget=budget):
            return (partition if args.bytes_only else compile_fx)(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    loss = compiled(imgs)[0]
    kept = kept_bytes(loss, model)
    loss.backward()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(imgs)[0].backward()

    return step, kept


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.memory_budget", description=__doc__.split("\n")[0])
    add = parser.add_argument
    sizes = [
        name.split("_")[2]
        for name in MODELS
        if name.startswith("convmae_") and name.count("_") == 3
    ]
    add("--model", default="tiny", choices=sizes, help="size of the model")
    add("--input_size", type=positive_int, default=224, metavar="PIXELS", help="side of the images")
    add("--batch_size", type=positive_int, default=16, metavar="N", help="images in a step")
    add("--budgets", type=share, nargs="+", default=[1, 0.7, 0.5, 0.3], metavar="SHARE")
    add("--rounds", type=positive_int, default=5, metavar="N", help="timed steps of each")
    add("--bytes_only", action="store_true", help="no times: seconds in the place of minutes")
    return parser


def table(kept: dict[str, int], seconds: dict[str, list[float]]) -> str:
    """MiB kept, and where they were measured the times and their ratio to the first form's."""
    rows = [["form", "MiB kept"], *([name, f"{n / 2**20:.1f}"] for name, n in kept.items())]
    if seconds:
        first = next(iter(seconds))
        rows[0] += ["s/step (min–max)", f"times {first} (min–max)"]
        for row in rows[1:]:
            own = seconds[row[0]]
            row += [median_and_range(own), median_and_range(ratios(own, seconds[first]))]
    return markdown_table(rows)


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    args = get_args_parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        use_fast_kernels()
    print_environment(environment("memory_budget", argv, device))
    forms = {f"budget {budget:g}": (budget, False) for budget in args.budgets}
    forms["--grad_checkpointing"] = (1, True)
    ready = {name: ready_step(args, *form) for name, form in forms.items()}
    seconds = {}
    if not args.bytes_only:
        steps = {name: step for name, (step, _) in ready.items()}
        seconds = time_rounds(steps, args.rounds, step_time(device))
    print(f"\n{table({name: kept for name, (_, kept) in ready.items()}, seconds)}")


if __name__ == "__main__":
    main(sys.argv[1:])
