import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def every_certificate(monkeypatch):
    """For tests that choose among places that are run: which batches are certified depends on the clock."""
    from unlearn_ext.fisher.engine import per_sample

    monkeypatch.setattr(per_sample, "CERTIFICATES", float("inf"))
