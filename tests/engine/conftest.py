import sys
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("oracle")
# For `bench`, and at the end: the package that is tested may be installed elsewhere.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def one_thread():
    """Models of this size gain nothing from threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
