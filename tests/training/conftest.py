import pytest

from tests.training import jobs


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    jobs.make_models(folder)
    return folder
