#!/usr/bin/env python3
"""Exit with 0 if the server in this container accepts clients: `/api/health` answers 200."""

import http.client
import os
import ssl
import sys


def main() -> int:
    """Query the health document once. A draining server answers 503."""
    port = int(os.environ.get("PORT") or 3001)
    connection: http.client.HTTPConnection
    if os.environ.get("TLS_CERT"):
        # The certificate names the public host, not 127.0.0.1.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=3, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", "/api/health")
        return int(connection.getresponse().status != http.HTTPStatus.OK)
    except (OSError, http.client.HTTPException):
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
