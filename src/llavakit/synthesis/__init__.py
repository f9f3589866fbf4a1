"""Synthesis: training records made of other records, with a teacher or without, at any scale.

`pipeline` says what a pipeline is, `work` does one item, `ledger` keeps what is done, `run` and `on_ray` run many.
"""
