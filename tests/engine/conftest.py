import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("oracle")


@pytest.fixture
def no_certificates(monkeypatch):
    """For tests that count what runs: which batches are certified depends on the clock."""
    from unlearn_ext.fisher.engine import per_sample

    monkeypatch.setattr(per_sample, "CERTIFICATES", 0.0)


# For `bench`, and at the end: the package that is tested may be installed elsewhere.
sys.path.append(str(Path(__file__).parents[2]))
