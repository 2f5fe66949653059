"""Models: which ones a line may name."""

from fastapi import Response

from penstock.api.auth import AskedService, AskingProject
from penstock.api.wire import answer, model_to_wire


async def list_models(service: AskedService, project: AskingProject) -> Response:
    """List models.

    Those that the upstreams say they serve, and those that the settings name. An upstream
    that does not answer adds only the latter.
    """
    models = await service.list_models()
    return answer({"object": "list", "data": [model_to_wire(model) for model in models]})
