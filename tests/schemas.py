"""Write the published descriptions: `python -m tests.schemas`.

Those of the API are what a running server tells, so that clients can be made without one. That
of the chart's values is made from the settings.
"""

import json
import re
from pathlib import Path

from penstock.api.lines import LINE_SCHEMAS
from penstock.api.routes import describe
from tests.deploy.values_schema import values_schema

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
VALUES = ROOT / "deploy" / "helm" / "penstock" / "values.schema.json"


def published() -> dict[Path, str]:
    """What each file holds."""
    files = {
        DOCS / "schemas" / f"{_snake_case(name)}.schema.json": schema
        for name, schema in LINE_SCHEMAS.items()
    }
    return {
        path: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        for path, value in (
            {DOCS / "openapi.json": describe(), VALUES: values_schema()} | files
        ).items()
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def main() -> None:
    for path, text in published().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
