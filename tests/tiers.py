"""The two tiers of the suite (see `thorough` in pyproject.toml), for `pytest.mark.parametrize`."""

import pytest


def later(*values):
    """Cases of the thorough tier."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


def cases(named, first):
    """A case for each value of a dict, with its name; those that `first` does not name are thorough."""
    assert set(first) <= set(named)
    return [
        pytest.param(value, id=str(name), marks=[] if name in first else [pytest.mark.thorough])
        for name, value in named.items()
    ]
