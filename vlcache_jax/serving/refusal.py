"""What a client is told when there is no answer, in the form of OpenAI's errors."""

from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """No answer, and why.

    Args:
      status: of HTTP.
      message: for people.
      param: the field of the request that is at fault.
      code: for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
