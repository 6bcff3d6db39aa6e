"""Templates, as the SDK has them: prompts with holes, by name and version, which `create_video(template=...)` fills.

await client.create_template("cat", "a {animal} in {place}", [Variable("animal", max_length=40), ...])
await client.create_video(template=types.TemplateUse("cat", {"animal": "cat", "place": "Rome"}))
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Unpack

from framewire import encode, transport, types
from framewire.decode import decode
from framewire.gateway.v1 import template_pb2, template_pb2_grpc
from framewire.uploads import new_request_id

_PAGE_SIZE = 100


@dataclass(frozen=True, slots=True)
class Variable:
    """What goes into the holes of its name. A "STRING" has lengths or choices, an "INTEGER" or "NUMBER" min and max.

    Without a default each request must say it.
    """

    name: str
    type: str = "STRING"
    description: str = ""
    default_value: types.OptionValue | None = None
    min_length: int = 0
    max_length: int = 0
    choices: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """A version of a template. It never changes but for being archived; without an account it is everyone's."""

    name: str
    version: int
    account_id: str
    description: str
    spec: types.VideoSpec
    variables: tuple[Variable, ...]
    created_at: datetime | None
    archived_at: datetime | None


class Templates:
    """The part of a Client that is about templates. "NAME" is the account's own, "shared/NAME" everyone's."""

    account_id: str

    @property
    def _transport(self) -> transport.Transport:
        raise NotImplementedError  # a Client has it; this class is no client by itself

    @property
    def _templates(self) -> template_pb2_grpc.TemplateServiceAsyncStub:
        return template_pb2_grpc.TemplateServiceStub(self._transport.channel)

    async def create_template(
        self,
        name: str,
        prompt: str,
        variables: Sequence[Variable] = (),
        *,
        description: str = "",
        request_id: str = "",
        **fields: Unpack[encode.SpecFields],
    ) -> Template:
        """Makes a template, or a further version of it. `{name}` in the prompt is a hole, `{{` and `}}` are braces.

        Further fields are what a video gets that does not say them. "shared/NAME" is for operators to make.
        """
        with encode.carried("template"):
            request = template_pb2.CreateTemplateRequest(
                request_id=request_id or new_request_id(),
                account_id=self._owner(name),
                name=name,
                description=description,
                spec=encode.spec(prompt, fields),
                variables=[_variable(each) for each in variables],
            )
        return decode(
            Template, await self._transport.unary(self._templates.CreateTemplate, request)
        )

    async def get_template(self, name: str, *, version: int = 0) -> Template:
        """A version; the latest in use unless told."""
        request = template_pb2.GetTemplateRequest(
            account_id=self._owner(name), name=name, version=version
        )
        return decode(Template, await self._transport.unary(self._templates.GetTemplate, request))

    async def list_templates(
        self, name: str = "", *, archived: bool = False
    ) -> AsyncGenerator[Template, None]:
        """The account's templates and everyone's, the latest version of each; or all versions of one."""
        request = template_pb2.ListTemplatesRequest(
            account_id=self.account_id, page_size=_PAGE_SIZE, name=name, archived=archived
        )
        while True:
            page = await self._transport.unary(self._templates.ListTemplates, request)
            for template in page.templates:
                yield decode(Template, template)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def archive_template(self, name: str, *, version: int = 0) -> Template:
        """Takes a version, or all that there are, out of use. What was made from it stays. Idempotent."""
        request = template_pb2.ArchiveTemplateRequest(
            account_id=self._owner(name), name=name, version=version
        )
        return decode(
            Template, await self._transport.unary(self._templates.ArchiveTemplate, request)
        )

    def _owner(self, name: str) -> str:
        return "" if name.startswith("shared/") else self.account_id


def _variable(each: Variable) -> template_pb2.TemplateVariable:
    fields = {field.name: getattr(each, field.name) for field in dataclasses.fields(each)}
    fields["type"] = encode.enum_value(
        template_pb2.VariableType, "VARIABLE_TYPE_", each.type, "type"
    )
    default = fields.pop("default_value")
    made = template_pb2.TemplateVariable(**fields)
    if default is not None:
        made.default_value.CopyFrom(encode.option(default))
    return made
