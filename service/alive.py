"""`python -m service.alive`: whether the API of this container answers; the image's health check.

Nothing but the standard library is imported, since it runs every few seconds.
"""

from __future__ import annotations

import os
import sys
from http.client import HTTPConnection, HTTPException

TIMEOUT = 5.0  # seconds
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what listens everywhere listens here, too


def main() -> int:
    """Ask for a sign of life; returns the exit status. An answer that asks for a key is one."""
    host, port = os.environ.get("GRADSTORE_HOST", "127.0.0.1"), int(os.environ.get("GRADSTORE_PORT", "8000"))
    connection = HTTPConnection(LOOPBACK.get(host, host), port, timeout=TIMEOUT)
    try:
        key = os.environ.get("GRADSTORE_API_KEY")
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {key}"} if key else {})
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        sys.stderr.write(f"nothing answers at {host} port {port}: {error}\n")
        return 1
    finally:
        connection.close()
    return 0 if status < 500 else 1


if __name__ == "__main__":
    sys.exit(main())
