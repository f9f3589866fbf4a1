"""Scoring of written reports: files with ids, every metric with its interval, two systems compared.

files      predictions and references from JSONL, JSON or CSV, matched by id
metrics    which metrics there are, what each needs, and those that can be computed from what was given
rubric     errors counted by a judge, as a YAML file describes them
score      `score_reports`: one or two prediction files -> values, intervals, paired tests
audit      phantom reports damaged on purpose: which metrics notice
"""
