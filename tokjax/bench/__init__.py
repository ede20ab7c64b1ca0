"""Measuring: multiply-accumulates, time, memory."""
