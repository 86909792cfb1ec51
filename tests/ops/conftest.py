"""How many cases test_attack.py and test_attack_fused.py take, and which."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, seed, settings

FEW = 150


def pytest_addoption(parser):
    parser.addoption('--attack', type=int, default=0, metavar='CASES', help='attack the operators with so many cases')
    parser.addoption('--attack-seed', type=int, metavar='SEED', help='attack with other cases, of each seed its own')


@pytest.fixture
def attack_count(request) -> int:
    return request.config.getoption('--attack')


@pytest.fixture
def attacking(request, attack_count) -> Callable[[float], Callable]:
    """attacking(share) gives a test of hypothesis its share of the cases, and those of --attack-seed.

    Several processes, each with a seed, share a large number of cases.
    """
    number = request.config.getoption('--attack-seed')

    def with_share(share: float) -> Callable:
        chosen = settings(
            max_examples=round(attack_count * share) if attack_count else FEW,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return lambda test: chosen(test if number is None else seed(number)(test))

    return with_share
