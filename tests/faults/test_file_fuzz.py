"""Random damage to saved files. A hundred thousand: ``make check-faults``."""

import file_fuzz

from unlearn_ext._internal import files


def test_damaged_files_are_refused_or_read_as_they_were_written():
    wrong = []
    happened = file_fuzz.fuzz(600, 500_000, wrong.append)
    assert not wrong
    assert happened["refused"] > 400
    assert happened["as written"] > 10
    assert happened["another"] > 10


def test_damage_that_is_not_noticed_is_seen(monkeypatch):
    monkeypatch.setattr(files, "_digest", lambda tensors, facts: "0")
    wrong = []
    file_fuzz.fuzz(200, 0, wrong.append)
    assert any("read as something else" in text for text in wrong)
