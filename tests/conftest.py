"""How the suite is spread over two processes: a file stays in one of them, and so do all tests that share a finished workflow."""

import pytest


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: item.get_closest_marker("workflow") is None
    )  # the longest ones first, or the last worker ends late
    for item in items:
        group = "finished" if "finished" in item.fixturenames else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))
