"""A file is the old one or the new one, whenever its writer is killed. More: ``make check-faults``."""

from kill_writers import kill


def test_writers_killed_at_any_moment():
    assert kill(6, seed=1) == 24
