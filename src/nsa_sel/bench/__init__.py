"""Measure the selection kernel: cases, inputs, timing, comparison and report."""
