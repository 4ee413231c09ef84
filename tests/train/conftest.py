import pytest

from slimkernels import elastic
from tests.train import stand_in


@pytest.fixture
def tiny_elastic(monkeypatch):
    """`elastic.width` and `elastic.plan` of the stand-in network."""
    monkeypatch.setattr(elastic, "width", stand_in.width, raising=False)
    monkeypatch.setattr(elastic, "plan", stand_in.plan, raising=False)
