"""Two cores are shared with whatever else runs: one thread per process keeps tests fast and repeatable."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """Ray on this machine with room for two workers, which find the modules of the tests."""
    found = pytest.importorskip("ray")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    found.init(num_cpus=2, runtime_env=environment, **quiet)
    yield found
    found.shutdown()
