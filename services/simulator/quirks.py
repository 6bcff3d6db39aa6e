"""How other servers of the same protocol differ: quirks, switched on by the setting `quirks`, and personalities.

A personality is a living server, as a set of quirks; each of them is served at `/servers/NAME/v1`, always.

| name                | what differs                                                             |
|---------------------|--------------------------------------------------------------------------|
| create_202          | a creation answers 202                                                   |
| omit_nulls          | null fields are left out of the job                                      |
| no_in_progress      | a job is queued with progress 0 until it ends                            |
| other_words         | `submitted`, `processing`, `succeeded` for the first three states        |
| string_error        | a failed job's `error` is a plain string                                 |
| int_error_code      | a failed job's `error.code` is a number                                  |
| failed_as_500       | GET of a failed job answers 500 with the job as its body                 |
| duration            | a number `duration` in place of the string `seconds`                     |
| integer_seconds     | `seconds` may be an integer in the request                               |
| detail_errors       | errors are `{"detail": message}`                                         |
| delete_shows_object | DELETE answers the job with status `deleted`                             |
| redirect_content    | content answers 302 to the same address with one more query field        |
| multipart_only      | JSON creations are refused, with 422                                     |
| json_without_file   | multipart creations without a file are refused                           |
| number_seconds      | `seconds` in JSON must be an integer                                     |
| sides               | `width` and `height` in place of `size`, in the request                  |
| api_key_header      | the key comes in `api-key`, and nowhere else                             |
| any_key             | no key is asked for                                                      |
| no_list             | there is no list                                                         |
| whole_list          | the list has no pages: all of it, without cursors                        |
| other_model         | jobs show the model `sora-2`, whatever was asked for                     |
| codeless_error      | a failed job's `error` has a message and no code                         |
| delete_aborts       | DELETE of a running job stops it, and it is not billed                   |
| unready_as_400      | content of an unfinished job answers 400                                 |
| failed_as_422       | content of a failed job answers 422                                      |
| gen_ids, bare_ids, wrapped_ids | ids are `video_gen_...`, bare, or base64 with `/` and `=`     |
| flat_errors         | the error body as specified, where the real service wraps it in `error`  |
| failed_generations  | a failed job lists its generations all the same                          |
| no_inpaint_echo     | `inpaint_items` is null in every job                                     |

The last three are of `azure_jobs` alone. Of the others it knows create_202, omit_nulls,
failed_as_500, detail_errors, delete_shows_object and redirect_content.
"""

import base64
from collections.abc import Collection, Mapping

# What bends the answers only: all of these can be had at once.
BENDS = frozenset(
    (
        "create_202",
        "omit_nulls",
        "no_in_progress",
        "other_words",
        "string_error",
        "int_error_code",
        "failed_as_500",
        "duration",
        "integer_seconds",
        "detail_errors",
        "delete_shows_object",
        "redirect_content",
        "flat_errors",
        "failed_generations",
        "no_inpaint_echo",
    )
)
NAMES = BENDS | frozenset(
    (
        "multipart_only",
        "json_without_file",
        "number_seconds",
        "sides",
        "api_key_header",
        "any_key",
        "no_list",
        "whole_list",
        "other_model",
        "codeless_error",
        "delete_aborts",
        "unready_as_400",
        "failed_as_422",
        "gen_ids",
        "bare_ids",
        "wrapped_ids",
        "video_reference",
    )
)
PERSONALITIES: Mapping[str, frozenset[str]] = {
    "openai": frozenset(),
    "azure_v1": frozenset({"api_key_header", "bare_ids"}),
    "vllm_omni": frozenset(
        {
            *("multipart_only", "gen_ids", "no_in_progress", "int_error_code", "failed_as_500"),
            *("detail_errors", "delete_aborts", "failed_as_422", "any_key"),
            "video_reference",
        }
    ),
    "sglang": frozenset(
        {
            *("json_without_file", "number_seconds", "bare_ids", "no_in_progress", "omit_nulls"),
            *("codeless_error", "other_model", "detail_errors", "delete_shows_object"),
        }
    ),
    "litellm": frozenset({"wrapped_ids", "no_list"}),
    "tensorrt_llm": frozenset(
        {"create_202", "duration", "string_error", "whole_list", "unready_as_400", "detail_errors"}
    ),
    "reseller": frozenset({"other_words", "sides", "redirect_content", "omit_nulls"}),
}
_OTHER_WORDS = {"queued": "submitted", "in_progress": "processing", "completed": "succeeded"}


def bend(shown: Mapping[str, object], quirks: Collection[str]) -> dict[str, object]:
    """The Video object as a server with these quirks shows it."""
    bent = dict(shown)
    if "no_in_progress" in quirks and bent["status"] == "in_progress":
        bent |= {"status": "queued", "progress": 0}
    if "other_words" in quirks:
        bent["status"] = _OTHER_WORDS.get(str(bent["status"]), bent["status"])
    error = bent["error"]
    if isinstance(error, Mapping):
        if "string_error" in quirks:
            bent["error"] = error["message"]
        elif "codeless_error" in quirks:
            bent["error"] = {"message": error["message"]}
        elif "int_error_code" in quirks:
            bent["error"] = {**error, "code": 400 if "moderation" in error["code"] else 500}
    if "other_model" in quirks:
        bent["model"] = "sora-2"
    if "duration" in quirks:
        bent["duration"] = float(str(bent.pop("seconds")))
    return without_nulls(bent, quirks)


def job_id(known: str, quirks: Collection[str]) -> str:
    """A new job's id as such a server makes it."""
    unique = known.rpartition("_")[2]
    if "gen_ids" in quirks:
        return f"video_gen_{unique[-32:]}"
    if "bare_ids" in quirks:
        return unique[-32:]
    if "wrapped_ids" in quirks:
        inner = f"litellm:custom_llm_provider:azure;model_id:???;video_id:{known}"
        return f"video_{base64.b64encode(inner.encode()).decode()}"
    return known


def without_nulls(shown: Mapping[str, object], quirks: Collection[str]) -> dict[str, object]:
    """The object, with null fields left out where the quirk says so."""
    keep_all = "omit_nulls" not in quirks
    return {name: value for name, value in shown.items() if keep_all or value is not None}
