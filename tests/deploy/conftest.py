import pytest

from tests.clients.conftest import give_up
from tests.clients.environments import Unavailable
from tests.deploy.tools import Tools, install


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Helm and the schemas."""
    try:
        return install()
    except Unavailable as error:
        give_up(error)
