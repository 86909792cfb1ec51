"""An HTTP server on this machine that breaks connections as told."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What a server gives, and how it fails.

    breaks: after how many bytes the connection breaks, an entry for each request; then whole answers.
    then: other contents and etag after the first request.
    """

    def __init__(self, contents: bytes, breaks=(), etag='"one"', ranges=True, status=200, length=True, then=None):
        self.contents, self.breaks, self.etag = contents, list(breaks), etag
        self.ranges, self.status, self.length = ranges, status, length
        self.then = then
        self.asked = []  # the byte each request began at


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        files, start = self.server.files, 0
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if wanted and files.ranges and self.headers.get('If-Range') == files.etag:
            start = int(wanted[1])
        files.asked.append(start)
        if files.status != 200:
            return self.send_error(files.status)
        rest = files.contents[start:]
        self.send_response(206 if start else 200)
        if files.length:
            self.send_header('Content-Length', str(len(rest)))
        if files.etag:
            self.send_header('ETag', files.etag)
        self.end_headers()
        self.wfile.write(rest[: files.breaks.pop(0)] if files.breaks else rest)
        self.close_connection = True
        if files.then:
            files.contents, files.etag = files.then
        return None

    def log_message(self, *args):
        pass


@contextmanager
def serve(files: Files):
    """The server's address while it runs."""
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.files = files
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()
            thread.join()
