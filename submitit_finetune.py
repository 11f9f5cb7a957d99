"""Fine-tune on SLURM: flags of `submitit_launch.py` and `main_finetune.py` in one command line."""

import sys

from submitit_launch import main, parse_args_with
from util.run.program import run_main

if __name__ == "__main__":
    sys.exit(run_main(main, parse_args_with("main_finetune.py")))
