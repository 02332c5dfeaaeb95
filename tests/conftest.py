"""The order of the suite: whole workflows first, so that no worker begins one when the others are done."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)
