"""AIBrix's batch service on `PORT` of the loopback, sending to the endpoint at `URL`.

    aibrix_service.py URL PORT

As shipped it sends to what it has set up itself on Kubernetes or in a cloud, or nowhere. For an
endpoint that is there already it has a runtime and a source, but no option that joins the two;
the registry in which it lets others put runtimes of their own does.
"""

import sys
from typing import Any

import uvicorn
from aibrix.batch.client.sources.static import GatewayEndpointSource
from aibrix.batch.job_driver.runtime import ExternalRuntime, register_runtime
from aibrix.metadata.app import build_app, build_app_args


def main() -> None:
    url, port = sys.argv[1:]

    def to_endpoint(*, context: Any = None, **_: Any) -> ExternalRuntime:
        return ExternalRuntime(GatewayEndpointSource(url), context=context)

    register_runtime("External", to_endpoint)
    app = build_app(build_app_args())
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
