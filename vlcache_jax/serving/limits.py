"""What one client may take of a server."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; whatever is above one of them is refused before it costs anything.

    Attributes:
      requests: at the same time, those that are being answered included; others are told to come back (429).
      seconds: from a request's arrival to the end of its answer.
      body_seconds: in which a request must have arrived.
      body_bytes: of a request, its images included.
      images: of a request.
      pixels: of all images of a request, by their headers.
      samples: answers to one request, `n`.
      stops: stop texts.
    """

    requests: int = 256
    seconds: float = 600.0
    body_seconds: float = 60.0
    body_bytes: int = 32 * 2**20
    images: int = 16
    pixels: int = 50_000_000
    samples: int = 16
    stops: int = 16
