"""The paper's claims on real photographs, small: `python -m benchmarks.proof --help`."""
