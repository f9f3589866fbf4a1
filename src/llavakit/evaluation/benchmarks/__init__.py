"""Benchmarks: how each one writes its questions, gold answers and submissions, and how it scores.

One module per benchmark, or per family that shares a format. A benchmark is a subclass of `base.Benchmark`; its name
is registered in `llavakit.evaluation`.
"""
