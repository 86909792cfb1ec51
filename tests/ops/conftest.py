"""How many cases test_attack.py and test_attack_fused.py take, and which."""

from collections.abc import Callable

import hypothesis
import pytest


def pytest_addoption(parser):
    parser.addoption('--attack', type=int, default=0, metavar='CASES', help='attack the operators with so many cases')
    parser.addoption('--attack-seed', type=int, metavar='SEED', help='attack with other cases, of each seed its own')


@pytest.fixture
def attack_count(request) -> int:
    return request.config.getoption('--attack')


@pytest.fixture
def seeded(request) -> Callable[[Callable], Callable]:
    """Gives a test of hypothesis the cases of --attack-seed: so several processes share a large number of them."""
    seed = request.config.getoption('--attack-seed')
    return (lambda test: test) if seed is None else hypothesis.seed(seed)
