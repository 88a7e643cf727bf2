"""`python -m worker.alive`: whether a worker of this host was seen in the last minute; the image's health check.

It asks the catalog, where workers leave their signs of life, and imports no torch.
"""

from __future__ import annotations

import socket
import sys

from sqlalchemy.exc import SQLAlchemyError

from datastore.catalog import Catalog
from datastore.errors import first_line
from datastore.leases import Jobs
from datastore.settings import Settings


def main() -> int:
    """Look for a worker of this host; returns the exit status."""
    catalog = Catalog(Settings().catalog_url)
    try:
        seen = [worker.id for worker in Jobs(catalog).workers()]
    except SQLAlchemyError as error:
        sys.stderr.write(f"the catalog does not answer: {first_line(error)}\n")
        return 1
    finally:
        catalog.close()
    host = socket.gethostname()
    if any(name.startswith(f"{host}-") for name in seen):
        return 0
    sys.stderr.write(f"no worker of {host} was seen in the last minute; seen were: {', '.join(seen) or 'none'}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
