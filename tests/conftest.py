"""Two cores are shared with whatever else runs: one thread per process keeps tests fast and repeatable."""

import os
from collections.abc import Mapping

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def measures_give_the_metrics(monkeypatch):
    """Whatever a test scores: what a metric's interval is computed from gives the metric that is printed."""
    from llavakit.evaluation import cases

    def agrees(measure, value):
        return value is None or measure.whole is None or measure.whole == pytest.approx(value, abs=0.06)

    before = cases.Metrics.__init__

    def checked(self, metrics, own, intervals=None):
        before(self, metrics, own, intervals)
        assert all(len(measure.table) == len(own.pairs) for measure in own.measures.values())
        for name, measure in own.measures.items():
            assert name not in metrics or agrees(measure, metrics[name]), name
        for table in own.tables:
            for row, numbers in own.rows(table).items():
                cells = metrics.get(table, {}).get(row, {})
                cells = cells if isinstance(cells, Mapping) else {own.main: cells}
                for name, measure in own.chosen(numbers).items():
                    assert agrees(measure, cells.get(name)), (table, row, name)

    monkeypatch.setattr(cases.Metrics, "__init__", checked)
