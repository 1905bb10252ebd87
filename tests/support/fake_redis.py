"""fakeredis' TCP server: a second implementation of Redis, for the storage contract."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import redis
from fakeredis import TcpFakeServer


@contextmanager
def fake_redis_server() -> Iterator[str]:
    """A fake Redis in a thread; its URL."""
    # The oldest supported version, so that a newer command fails here too.
    server = TcpFakeServer(("127.0.0.1", 0), server_version=(6,))
    server.RequestHandlerClass = _answering_errors(server.RequestHandlerClass)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answering_errors(handler: Any) -> Any:
    """The handler, but with errors as replies: fakeredis hangs up after one, such as NOSCRIPT."""

    class Handler(handler):
        def setup(self) -> None:
            super().setup()
            read = self.current_client.read_response

            def read_response(*arguments: Any, **options: Any) -> Any:
                try:
                    return read(*arguments, **options)
                except redis.ResponseError as error:
                    return error

            self.current_client.read_response = read_response

    return Handler
