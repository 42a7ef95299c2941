"""``python -m unlearn_ext``."""

import sys

from unlearn_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
