"""Passes of sharded models that were interrupted go on to the bits of those that were not."""

import pytest

CHECKS = "sharded_resume"


@pytest.mark.parametrize("estimator", ["per_sample", "mc"])
def test_they_go_on(two_ranks, tmp_path, estimator):
    one, other = two_ranks.run(CHECKS, "goes_on", str(tmp_path), estimator)
    assert one == other


def test_a_signal_to_end_waits_until_the_step_is_written_on_all_ranks(two_ranks, tmp_path):
    assert two_ranks.run(CHECKS, "told_to_end", str(tmp_path)) == [[1, 3], [1, 3]]


def test_files_of_different_steps(two_ranks, tmp_path):
    two_ranks.run(CHECKS, "files_of_different_steps", str(tmp_path))


def test_what_is_not_the_interrupted_call_is_refused(two_ranks, tmp_path):
    for found in two_ranks.run(CHECKS, "refused", str(tmp_path)):
        parts = (
            "others among the first",
            "got power",
            "got checkpoint_every",
            "checkpoint_every must be >= 1",
            "got weights",
            "must be of 2 ranks, got files of 4",
            "by all ranks up to one step",
        )
        for text, part in zip(found, parts, strict=True):
            assert part in text


def test_three_ranks(three_ranks, tmp_path):
    three_ranks.run(CHECKS, "goes_on", str(tmp_path), "per_sample")
