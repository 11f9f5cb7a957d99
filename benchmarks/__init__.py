"""What it costs: speed, memory, FLOPs."""
