"""Library of the programs; each folder has one subject.

- `data`: from files to batches;
- `layers`: geometry, depthwise convolutions and position tables, for the models;
- `weights`: checkpoint files, and how weights of any origin get into a model;
- `run`: command lines, processes, steps, schedules (`lr_sched`, `lars`), logs, resuming;
- `demo`: data that the demos make.
"""
