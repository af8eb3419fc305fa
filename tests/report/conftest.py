"""What several tests of the report look at, written once."""

import pytest

from dense_lab.report import write_report
from dense_lab.results import read_study
from tests.report import studies


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The report of one ablation."""
    return write_report([read_study(studies.small(tmp_path_factory.mktemp("one") / "small"))])


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """The report of two."""
    folder = tmp_path_factory.mktemp("two")
    found = [read_study(studies.small(folder / "small")), read_study(studies.factorial(folder / "factorial"))]
    return write_report(found, folder / "both")
