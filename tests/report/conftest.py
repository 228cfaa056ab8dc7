"""Made-up sweeps for the tests of the report."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def synthetic():
    """The module that makes up sweeps; tests are no package, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location("synthetic_sweep", Path(__file__).with_name("synthetic.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
