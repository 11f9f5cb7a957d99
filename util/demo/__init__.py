"""Data that the demos make."""
