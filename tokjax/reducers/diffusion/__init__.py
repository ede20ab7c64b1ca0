"""Reducers for diffusion models, one file a method."""
