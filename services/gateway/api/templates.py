"""TemplateService."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from framewire.gateway.v1 import template_pb2, template_pb2_grpc
from kit import errors, pages
from services.gateway import auth, messages, templates, videos
from services.gateway.api import common, creating, filling
from services.gateway.store import rows


class TemplateApi(template_pb2_grpc.TemplateServiceServicer):
    """Templates, served."""

    def __init__(self, parts: creating.Parts) -> None:
        self._kept = parts.store.templates
        self._accounts = parts.store.accounts
        self._models = parts.models
        self._pages = parts.pages
        self._videos = parts.store.videos

    async def CreateTemplate(
        self, request: template_pb2.CreateTemplateRequest, context: Any
    ) -> template_pb2.Template:
        """Makes a template, or a further version of it."""
        caller = common.caller()
        account_id = await self._owner(request.name, request.account_id, changing=True)
        fingerprint = videos.fingerprint(messages.own_fields(request))
        earlier = await self._kept.made_by(account_id, caller.scope, request.request_id)
        if earlier is not None:
            common.check_reuse(earlier[1], fingerprint)
            return _message(earlier[0])
        _check(request)
        asked = messages.asked_spec(request.spec)
        videos.check_defaults(asked, self._models, await self._videos.now())
        definition = template_pb2.Template(
            description=request.description, spec=request.spec, variables=request.variables
        )
        new = rows.NewTemplate(
            account_id, request.name, definition.SerializeToString(), caller.scope
        )
        made = await self._kept.create(
            new, caller.key_id, request.request_id, fingerprint, templates.MAX_IN_USE
        )
        if made is None:
            raise errors.ResourceExhausted(
                "TOO_MANY_TEMPLATES",
                f"{templates.MAX_IN_USE} versions of templates are in use: archive those that are not needed",
            )
        common.check_reuse(made[1], fingerprint)
        return _message(made[0])

    async def GetTemplate(
        self, request: template_pb2.GetTemplateRequest, context: Any
    ) -> template_pb2.Template:
        """A version of a template."""
        account_id = await self._owner(request.name, request.account_id)
        found = await self._kept.get(account_id, request.name, request.version)
        if found is None:
            raise filling.not_found(request.name, request.version)
        return _message(found)

    async def ListTemplates(
        self, request: template_pb2.ListTemplatesRequest, context: Any
    ) -> template_pb2.ListTemplatesResponse:
        """A page of templates, or of the versions of one."""
        of_everyone = not request.account_id and (
            common.caller().role is auth.Role.OPERATOR or request.name.startswith(templates.SHARED)
        )
        account_id = "" if of_everyone else await self._account(request.account_id)
        size = request.page_size or pages.DEFAULT_SIZE
        key = ("templates", account_id, request.name, request.archived)
        place = self._pages.place(key, request.page_token)
        after = place[1] if place else ""
        if request.name:
            owner = "" if request.name.startswith(templates.SHARED) else account_id
            before = int(after) if after else None
            found = await self._kept.versions(
                owner, request.name, request.archived, before, size + 1
            )
        else:
            found = await self._kept.latest([account_id, ""], request.archived, after, size + 1)
        token = ""
        if len(found) > size:
            last = found[size - 1]
            row_id = str(last.version) if request.name else last.name
            token = self._pages.token(key, last.created_at, row_id)
        return template_pb2.ListTemplatesResponse(
            templates=[_message(each) for each in found[:size]], next_page_token=token
        )

    async def ArchiveTemplate(
        self, request: template_pb2.ArchiveTemplateRequest, context: Any
    ) -> template_pb2.Template:
        """Takes a version, or all, out of use."""
        account_id = await self._owner(request.name, request.account_id, changing=True)
        found = await self._kept.archive(
            account_id, request.name, request.version, common.caller().key_id
        )
        if found is None:
            raise filling.not_found(request.name, request.version)
        return _message(found)

    async def _account(self, named: str) -> str:
        account_id = common.caller().account(named)
        if await self._accounts.get(account_id) is None:
            raise auth.account_not_found()
        return account_id

    async def _owner(self, name: str, named: str, *, changing: bool = False) -> str:
        """Whose template of this name a request means; '' is everyone's."""
        if not name.startswith(templates.SHARED):
            return await self._account(named)
        if changing and common.caller().role is not auth.Role.OPERATOR:
            raise errors.PermissionDenied(
                "ROLE_NOT_ALLOWED",
                f"templates for everyone are made by operators: leave {templates.SHARED!r} out of the name",
            )
        return ""


def _check(request: template_pb2.CreateTemplateRequest) -> None:
    if request.name.startswith(templates.SHARED) and request.account_id:
        raise filling.invalid("account_id", "must be empty for a template that is everyone's")
    variables = [filling.variable(each) for each in request.variables]
    wrong = list(templates.faults(request.spec.prompt, variables))
    for number, each in enumerate(request.variables):
        wrong += [(f"variables[{number}].{field}", rule) for field, rule in _strange(each)]
    for field in ("input_image_id", "inputs"):
        if getattr(request.spec, field):
            wrong.append((f"spec.{field}", "come with each request"))
    if wrong:
        raise errors.InvalidArgument(
            "TEMPLATE_INVALID",
            "; ".join(f"{field}: {rule}" for field, rule in wrong),
            violations=wrong,
        )


def _strange(given: template_pb2.TemplateVariable) -> Iterator[tuple[str, str]]:
    """What is set that this type has not: left alone, it would be thought to hold."""
    if given.HasField("default_value") and messages.option(given.default_value) is None:
        yield "default_value", "must be a text or a number"
    if given.type == template_pb2.VARIABLE_TYPE_STRING:
        others, whose = ("min", "max"), "a number's"
    else:
        others, whose = ("min_length", "max_length"), "a text's"
    for field, _ in given.ListFields():
        if field.name in others:
            yield field.name, f"is {whose}"


def _message(found: rows.Template) -> template_pb2.Template:
    made = template_pb2.Template.FromString(found.definition)
    made.name, made.version, made.account_id = found.name, found.version, found.account_id
    made.created_at.FromDatetime(found.created_at)
    if found.archived_at is not None:
        made.archived_at.FromDatetime(found.archived_at)
    return made
