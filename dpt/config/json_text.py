"""Parse JSON written by people: errors are reported where the mistake is, not where the parser noticed it."""

import json
from typing import Any

from dpt.errors import UserError


def parse_object(text: str, source: str, what: str) -> dict[str, Any]:
    """Parse the JSON object in `text`; UserError, naming `source`, for broken JSON or anything but an object (`what` it is)."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not valid JSON: {json_problem(text, error)}.") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, objects within objects without end
        raise UserError(f"{source}: the JSON cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{source}: {what} is a JSON object, not a {type(value).__name__}.")
    return value


def json_problem(text: str, error: json.JSONDecodeError) -> str:
    """The mistake and its place, in words: a comma too few or too many belongs to the end of what precedes it."""
    before = text[: error.pos].rstrip()
    place = _place(text, len(before) - 1 if before else 0)
    if not text.strip():
        return "the file is empty"
    if error.pos >= len(text.rstrip()):
        return f"it ends too early, after {place}"
    if error.msg.startswith("Expecting ',' delimiter"):
        return f"a comma or a closing bracket is missing after {place}"
    if before.endswith(",") and (text[error.pos] in "}]" or error.msg.startswith("Illegal trailing comma")):
        return f"there is a comma too many at {place}"
    if error.msg.startswith("Illegal trailing comma"):
        return f"there is a comma too many at {_place(text, error.pos)}"
    words = {"Expecting property name": "a name in double quotes is expected", "Expecting value": "a value is expected"}
    said = next((said for start, said in words.items() if error.msg.startswith(start)), error.msg.lower())
    return f"{said} at {_place(text, error.pos)}"


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"
