from tests.training.conftest import models_folder  # noqa: F401  (a fixture)
