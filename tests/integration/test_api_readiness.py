"""What an API without workers says of the database that it cannot do without."""

from pathlib import Path

from penstock.app import open_app
from penstock.checkup import migrate_database
from penstock.settings import Settings
from tests.integration.bench import until
from tests.postgres import PostgresServer


async def test_a_database_that_is_away_is_told_until_it_is_back(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    url = own_postgres.make_database()
    await migrate_database(url)
    settings = Settings(data_dir=tmp_path, database_url=url)

    async with open_app(settings, works=False) as app:

        async def is_told() -> bool:
            return "database" in app.health.faults()

        async def is_well() -> bool:
            return not app.health.faults()

        await until(is_well)
        own_postgres.stop(immediate=True)
        await until(is_told)
        own_postgres.start()
        await until(is_well)
