"""What holds for every test: no test asserts a time, so generated cases have no deadline either; which tests share a worker."""

import pytest
from hypothesis import settings

settings.register_profile("moesaic", deadline=None)
settings.load_profile("moesaic")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n`, one worker for a file, whose fixtures are then built once; and one for all that start MPI jobs.

    Some of these look for what a job leaves on the machine.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            names = vars(item.getparent(pytest.Module).obj).values()  # type: ignore[union-attr]
            starts_mpi = any(getattr(value, "__module__", None) == "tests.helpers.mpi" for value in names)
            item.add_marker(pytest.mark.xdist_group("mpi" if starts_mpi else item.nodeid.partition("::")[0]))
