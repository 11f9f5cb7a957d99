"""A training run: command line, processes, steps, logs, resuming."""
