"""The protocols' errors: one exception, its envelopes, and the messages clients match on."""

from collections.abc import Mapping, Sequence

from starlette import responses

AZURE_TYPE = "video_generation_user_error"

# Errors of the gateway before the service: always wrapped, with the status as their code. By our code.
_AT_THE_FRONT_DOOR = {
    "no_route": "Resource not found",
    "invalid_api_key": "Access denied due to invalid subscription key or wrong API endpoint. Make"
    " sure to provide a valid key for an active subscription.",
    "rate_limit_exceeded": "Requests to the video generation operation have exceeded the call rate"
    " limit of your current pricing tier. Try again in {} seconds.",
}


class ApiError(Exception):
    """Becomes an error answer with all four keys of the envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type_
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def response(self, *, as_detail: bool = False) -> responses.Response:
        """The answer as the client gets it; `as_detail` is how FastAPI servers put it."""
        if as_detail:
            return self._answer({"detail": self.message})
        return self._answer(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def azure_response(self, *, flat: bool, as_detail: bool = False) -> responses.Response:
        """The same in the azure_jobs dialect: flat as specified, or wrapped as it was seen."""
        if as_detail:
            return self._answer({"detail": self.message})
        if self.code in _AT_THE_FRONT_DOOR:
            message = _AT_THE_FRONT_DOOR[self.code].format(self.headers.get("retry-after", "60"))
            return self._answer({"error": {"code": str(self.status), "message": message}})
        body: dict[str, object] = {
            "code": None,
            "message": self.message,
            "param": self.param,
            "type": self.type if self.status >= 500 else AZURE_TYPE,
        }
        if self.code == "moderation_blocked":
            body["inner_error"] = {
                "code": "ResponsibleAIPolicyViolation",
                "revised_prompt": None,
                "error_details": {},
            }
        return self._answer(body if flat else {"error": body})

    def _answer(self, body: object) -> responses.Response:
        return responses.JSONResponse(body, self.status, headers=self.headers)


def choices(values: Sequence[str], last: str) -> str:
    """`'4', '8', and '12'`, as the service lists values; `last` is the word before the last."""
    quoted = [f"'{value}'" for value in values]
    if len(quoted) < 2:
        return "".join(quoted)
    if len(quoted) == 2:
        return f"{quoted[0]} {last} {quoted[1]}"
    return f"{', '.join(quoted[:-1])}, {last} {quoted[-1]}"


def invalid_value(param: str, value: str, allowed: Sequence[str]) -> ApiError:
    """A value that is not in the enum."""
    message = f"Invalid value: '{value}'. Supported values are: {choices(allowed, 'and')}."
    return ApiError(400, message, param=param, code="invalid_value")


def invalid_type(param: str, expected: str, value: object) -> ApiError:
    """A JSON value of the wrong type."""
    got = {
        bool: "a boolean",
        int: "an integer",
        float: "a decimal number",
        str: "a string",
        list: "an array",
        dict: "an object",
        type(None): "null",
    }.get(type(value), "something else")
    message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
    return ApiError(400, message, param=param, code="invalid_type")


def missing(param: str) -> ApiError:
    """A required field that is not there."""
    return ApiError(
        400,
        f"Missing required parameter: '{param}'.",
        param=param,
        code="missing_required_parameter",
    )


def no_such(what: str, id_: str) -> ApiError:
    """Unknown, deleted, or another key's."""
    return ApiError(404, f"{what} with id '{id_}' not found.", param=f"{what.lower()}_id")


def server_error(status: int) -> ApiError:
    """The service's own trouble."""
    message = "The server had an error while processing your request. Sorry about that!"
    return ApiError(status if 400 <= status <= 599 else 500, message, type_="server_error")


def rate_limited(headers: Mapping[str, str] | None = None) -> ApiError:
    """Too many requests a minute."""
    return ApiError(
        429,
        "Rate limit reached. Please try again later.",
        type_="requests",
        code="rate_limit_exceeded",
        headers=headers,
    )


def out_of_money() -> ApiError:
    """The account's money is used up."""
    message = "You exceeded your current quota, please check your plan and billing details."
    return ApiError(429, message, type_="insufficient_quota", code="insufficient_quota")


def redirected() -> ApiError:
    """A service that has moved."""
    return ApiError(307, "Moved.", headers={"location": "/elsewhere"})


def daily_cap() -> ApiError:
    """Too many creations in a day."""
    return ApiError(429, "You have reached your daily limit of generations for this model.")


def too_many_tasks() -> ApiError:
    """Too many jobs at once; seen word for word on the live service."""
    return ApiError(429, "Too many running tasks", type_=AZURE_TYPE)


def moderated() -> ApiError:
    """Input moderation at submit."""
    return ApiError(
        400,
        "The request is blocked by our moderation system when checking inputs. Possible reasons:"
        " people-in-user-uploads.",
        code="moderation_blocked",
    )


def model_gone() -> ApiError:
    """What a retired model answers."""
    return ApiError(404, "The requested model does not exist.", code="model_not_found")


def no_deployment(model: str) -> ApiError:
    """The same in the azure_jobs dialect, where a model is a deployment of one's own."""
    return ApiError(
        404,
        f"The API deployment '{model[:64]}' for this resource does not exist. If you created the"
        " deployment within the last 5 minutes, please wait a moment and try again.",
        param="model",
    )


def not_accessible() -> ApiError:
    """Seen once on the live service for content that should have been there."""
    return ApiError(403, "Files [file_0] are not accessible")


def no_route() -> ApiError:
    """A wrong path, or a wrong version of the interface."""
    return ApiError(404, "Resource not found", code="no_route")


def wrong_key(key: str) -> ApiError:
    """A key that is missing or not known; the key itself is never repeated in full."""
    shown = f"{key[:3]}***" if key else "(none)"
    return ApiError(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")
