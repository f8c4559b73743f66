"""A judge's server for tests and benchmarks: real HTTP, OpenAI's protocol, told by the prompt how to behave."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-very-secret"


class _Handler(BaseHTTPRequestHandler):
    """The prompt's first word says what happens: slow, hang, cut, 500, 400, 429 (twice, then well), nonsense, key."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, picture = body["messages"][1]["content"]
        prompt = json.loads(question["text"].removeprefix("The prompt: "))
        assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
        server = self.server
        with server.lock:
            server.asked[prompt] += 1
            server.running += 1
            server.most = max(server.most, server.running)
            times = server.asked[prompt]
        try:
            self._answer(prompt, times)
        except BrokenPipeError:  # the client has given up, as it should
            pass
        finally:
            with server.lock:
                server.running -= 1

    def _answer(self, prompt, times):
        time.sleep(self.server.delay)
        how = prompt.split()[0]
        if how == "slow":
            time.sleep(0.3)
        elif how == "hang":
            self.server.over.wait(60)
        elif how == "cut":
            self.connection.close()
            return
        if how in ("500", "400") or how == "429" and times < 3:
            self._send(int(how), {"error": {"message": "told to fail"}})
        elif how == "key":
            self._send(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
        else:
            answer = '```json\n{"score": 7, "reason": "fine"}\n```'
            content = {"nonsense": "a very nice picture", "eleven": '{"score": 11}'}.get(how, answer)
            self._send(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]})

    def _send(self, status, answer):
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "judge"} | answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, delay):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.delay = delay
        self.lock, self.over, self.asked, self.running, self.most = threading.Lock(), threading.Event(), Counter(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):  # connections that clients have cut
        pass


@contextmanager
def judge_server(delay: float = 0.0):
    """`url`, how often each prompt was `asked`, and the `most` calls at the same time.

    Args:
        delay: seconds that every answer takes.
    """
    server = _Server(delay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
