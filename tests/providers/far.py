"""What the contract kit asks of a provider's fake, as far as all are alike."""

from typing import Any

from tests.providers.openai_server import Trouble


class FarProvider:
    """
    Args:
        provider: The fake, which has `jobs` by native ID, `is_down` and `spoil`.
    """

    create: str
    """What `spoil` calls the call by which a job is taken."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    @property
    def native_ids(self) -> list[str]:
        return list(self._provider.jobs)

    def lose_answer(self) -> None:
        self._provider.spoil(self.create, Trouble(is_lost=True))

    def answer_submissions(self, status: int) -> None:
        self._provider.spoil(self.create, Trouble(status=status))

    def go_down(self) -> None:
        self._provider.is_down = True
