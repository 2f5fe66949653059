"""Slices in any course of events, on PostgreSQL."""

from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings

from tests.postgres import Database
from tests.unit.test_store_machine import Slices


class PostgresSlices(Slices):
    """As on SQLite, on a database of its own for each course."""

    server: ClassVar[Database]
    template: ClassVar[str]

    def make_database(self) -> str:
        return self.server.make_database(template=self.template)

    def drop_database(self) -> None:
        self.server.drop_database(self.url)


@pytest.fixture(autouse=True, scope="module")
def _server(postgres: Database, migrated_template: str) -> None:
    PostgresSlices.server = postgres
    PostgresSlices.template = migrated_template


TestAnyCourseOfEvents = PostgresSlices.TestCase
TestAnyCourseOfEvents.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
