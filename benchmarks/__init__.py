"""Benchmarks of speed, memory and arithmetic."""
