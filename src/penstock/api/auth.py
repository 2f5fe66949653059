"""Whose request it is."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from penstock.model import ProjectId
from penstock.service import Service

_bearer = HTTPBearer(auto_error=False, description="A key of this server.")
_api_key = APIKeyHeader(
    name="api-key", auto_error=False, description="The same, as Azure's clients send it."
)


def get_service(request: Request) -> Service:
    """The service that this API was made for."""
    service: Service = request.app.state.service
    return service


AskedService = Annotated[Service, Depends(get_service)]


async def get_project(
    request: Request,
    service: AskedService,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    api_key: Annotated[str | None, Security(_api_key)],
) -> ProjectId:
    """The project that the request's key belongs to, or the one that needs no key."""
    open_project: ProjectId | None = request.app.state.open_project
    if open_project is not None:
        return open_project
    found = await service.authenticate(bearer.credentials if bearer else api_key)
    return found.project_id


AskingProject = Annotated[ProjectId, Depends(get_project)]
