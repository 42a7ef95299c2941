"""The code of the pages on many processes runs as it stands."""

import pytest


@pytest.mark.parametrize("page, n_blocks", [("processes.md", 2), ("sharded.md", 3)])
def test_code_of_a_page_runs_on_two_ranks(two_ranks, page, n_blocks):
    if page == "sharded.md":
        pytest.importorskip("transformers")
    assert two_ranks.run("pages", "run", page) == [n_blocks, n_blocks]
