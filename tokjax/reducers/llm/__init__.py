"""Reducers for language models, one file a method."""
