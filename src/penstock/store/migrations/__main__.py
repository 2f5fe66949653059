"""`python -m penstock.store.migrations URL` brings a database up to date, and no more.

A process of its own for it gives the memory that Alembic takes back when it ends.
"""

import asyncio
import sys

from penstock.store.sql import SqlStore


async def _upgrade(url: str) -> None:
    store = SqlStore(url)
    await store.open()
    await store.close()


asyncio.run(_upgrade(sys.argv[1]))
