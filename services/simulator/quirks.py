"""How other servers of the same protocol differ, switched on by the setting `quirks`.

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
| flat_errors         | the error body as specified, where the real service wraps it in `error`  |
| failed_generations  | a failed job lists its generations all the same                          |
| no_inpaint_echo     | `inpaint_items` is null in every job                                     |

The last three are of `azure_jobs` alone. Of the others it knows create_202, omit_nulls,
failed_as_500, detail_errors, delete_shows_object and redirect_content.
"""

from collections.abc import Collection, Mapping

NAMES = frozenset(
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
        elif "int_error_code" in quirks:
            bent["error"] = {**error, "code": 400 if "moderation" in error["code"] else 500}
    if "duration" in quirks:
        bent["duration"] = float(str(bent.pop("seconds")))
    return without_nulls(bent, quirks)


def without_nulls(shown: Mapping[str, object], quirks: Collection[str]) -> dict[str, object]:
    """The object, with null fields left out where the quirk says so."""
    keep_all = "omit_nulls" not in quirks
    return {name: value for name, value in shown.items() if keep_all or value is not None}
