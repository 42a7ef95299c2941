import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def three_ranks():
    pool = RankPool(3)
    yield pool
    pool.close()
