"""Write the published descriptions of the API: `python -m tests.schemas`.

They are what a running server tells, so that clients can be made without one.
"""

import json
import re
from pathlib import Path

from penstock.api.lines import LINE_SCHEMAS
from penstock.api.routes import describe

DOCS = Path(__file__).parent.parent / "docs"


def published() -> dict[Path, str]:
    """What each file holds."""
    files = {
        DOCS / "schemas" / f"{_snake_case(name)}.schema.json": schema
        for name, schema in LINE_SCHEMAS.items()
    }
    return {
        path: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for path, value in ({DOCS / "openapi.json": describe()} | files).items()
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def main() -> None:
    for path, text in published().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"docs/{path.relative_to(DOCS)}")


if __name__ == "__main__":
    main()
