"""How many cases test_attack.py takes."""

import pytest


def pytest_addoption(parser):
    parser.addoption('--attack', type=int, default=0, metavar='CASES', help='attack the operators with so many cases')


@pytest.fixture
def attack_count(request) -> int:
    return request.config.getoption('--attack')
