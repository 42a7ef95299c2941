"""A few runs of `fuzz.py`: random shares, and failures on some rank."""

import fuzz
import pytest


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_hang_and_no_wrong_number():
    assert fuzz.check(range(12), 2) > 0
