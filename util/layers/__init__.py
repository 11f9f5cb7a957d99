"""Layers and geometry of the models."""
