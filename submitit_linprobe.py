"""Probe on SLURM: flags of `submitit_launch.py` and `main_linprobe.py` in one command line."""

from util.signals import leave_on_signals

if __name__ == "__main__":  # from here on, while the rest is imported
    leave_on_signals()

import sys

from submitit_launch import main, parse_args_with
from util.run.program import run_main

if __name__ == "__main__":
    sys.exit(run_main(main, parse_args_with("main_linprobe.py")))
