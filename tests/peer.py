"""A server in the manner of OpenAI's on a loopback socket, which fails as it is told to."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nanorrm.judge.verdict import verdict_text


def oracle(user):
    """The verdict for a prompt that shows GOOD and BAD, after a thought."""
    return f"because</think>{verdict_text(1 if user.index('GOOD') < user.index('BAD') else 2)}"


class Peer:
    """`fault(number of the request, body)` names what goes wrong with it, or None.

    A fault: a status (500), (status, headers), (status, headers, message), or one of the words
    "malformed", "missing", "drop", "late" (longer than any timeout). `answered`: (prompt, seed) of
    every answer sent whole; `seen`: number of requests; `most`: the most at once.
    """

    def __init__(self, fault=lambda n, body: None, answer=None, models=("small",)):
        self.fault, self.models = fault, models
        self.answer = answer or (lambda user, body: {"content": oracle(user)})
        self.answered, self.headers, self.bodies = [], [], []
        self.seen = self.most = self.active = 0
        self.lock, self.port = threading.Lock(), 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                self.reply(200, {"data": [{"id": name} for name in peer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with peer.lock:
                    number, peer.seen = peer.seen, peer.seen + 1
                    peer.active += 1
                    peer.most = max(peer.most, peer.active)
                    peer.headers.append(dict(self.headers))
                    peer.bodies.append(body)
                try:
                    self.serve(body, peer.fault(number, body))
                except OSError:
                    self.close_connection = True  # the other side, or `stop`, hung up
                finally:
                    with peer.lock:
                        peer.active -= 1

            def serve(self, body, fault):
                user = body["messages"][-1]["content"]
                if fault == "drop":
                    self.close_connection = True
                elif fault == "late":
                    time.sleep(2.5)
                    self.close_connection = True
                elif fault == "malformed":
                    self.reply(200, b'{"choices": [{"mess')
                elif fault == "missing":
                    self.reply(200, {"choices": [{"message": {"content": "hm"}}]})
                elif fault is not None:
                    status, headers, message = (
                        fault if isinstance(fault, tuple) else (fault, {}, "x")
                    )
                    self.reply(status, {"error": {"message": message}}, headers)
                else:
                    message = {"content": "Hello"} if user == "Hi" else peer.answer(user, body)
                    choice = {"finish_reason": "stop", "message": message}
                    choice["finish_reason"] = message.pop("finish_reason", "stop")
                    usage = {"prompt_tokens": 11, "completion_tokens": 7}
                    self.reply(200, {"choices": [choice], "usage": usage})
                    with peer.lock:
                        peer.answered.append((user, body["seed"]))

            def reply(self, status, content, headers=()):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def process_request(self, request, address):
                peer.sockets.append(request)
                super().process_request(request, address)

            def handle_error(self, *_):
                pass

        self.sockets = []
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self):
        """Hang up on everybody, in the middle of what they say."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
