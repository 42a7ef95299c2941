"""Prints the requirements of extras of pyproject.toml, one a line: requirements.py EXTRA[,EXTRA...]."""

import ast
import re
import sys
from pathlib import Path

# tomllib is not in Python 3.10; an extra is a one-line list of strings, which Python reads as it stands.
text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
wanted = {
    requirement
    for extra in sys.argv[1].split(",")
    for requirement in ast.literal_eval(re.search(rf"^{extra} = (\[.*\])$", text, re.MULTILINE)[1])
}
print("\n".join(sorted(wanted)))
