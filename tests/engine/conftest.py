import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("oracle")
# For `bench`, and at the end: the package that is tested may be installed elsewhere.
sys.path.append(str(Path(__file__).parents[2]))
