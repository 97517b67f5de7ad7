"""What holds for every test: no test asserts a time, so generated cases have no deadline either."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("moesaic", deadline=None)
settings.load_profile("moesaic")

# Those with the longest files first: two workers (`pytest -n 2`), each with a file at a time, then end together.
FOLDERS = ("launch", "runtime", "jit", "docs", "kernels", "benchmarks", "collectives", "placement", "integrations")


class FoldersOnly:
    """The clone's folder is no package to pytest, which would import it by its name: a name with a dot in it cannot be."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == parent.config.rootpath else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FoldersOnly())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put folders into that order; tests of no folder come last."""
    places = {Path(__file__).parent / folder: place for place, folder in enumerate(FOLDERS)}
    items.sort(key=lambda item: places.get(item.path.parent, len(places)))
