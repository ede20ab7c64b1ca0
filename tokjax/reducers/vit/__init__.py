"""Reducers for vision transformers, one file a method."""
