"""A Google Cloud Storage of this machine: gcp-storage-emulator, and what tensorstore needs beyond it. A program.

  python tests/support/gcs_server.py PORT        prints "ready"; ends with its standard input

The emulator neither names an object's generation when it is read, nor heeds the conditions on generations by which
tensorstore keeps writers apart, nor moves objects; and it serves one connection at a time, so that one which a client
keeps open without a word stalls all.
"""

import http.server
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

read, write = objects.get, objects.insert


def generation_of(storage, bucket, name):
    """Return an object's generation; 0 where there is none, as in conditions."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def get(request, response, storage, *args, **kwargs):
    generation = generation_of(storage, request.params["bucket_name"], request.params["object_id"])
    if generation != "0" and request.query.get("ifGenerationNotMatch", [None])[0] == generation:
        response.status = HTTPStatus.NOT_MODIFIED
        return
    if request.query.get("alt", [None])[0] != "media":
        return read(request, response, storage)
    response["x-goog-generation"] = generation
    read(request, response, storage)


def insert(request, response, storage, *args, **kwargs):
    wanted = request.query.get("ifGenerationMatch", [None])[0]
    name = request.query.get("name", [""])[0]
    if wanted is not None and wanted != generation_of(storage, request.params["bucket_name"], name):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    write(request, response, storage)


objects.get, objects.insert = get, insert

from gcp_storage_emulator import server  # noqa: E402  (its table of routes takes the handlers as they are)

MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"


def move(request, response, storage, *args, **kwargs):
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)  # noqa: B010  (a class, to a type checker)
one_at_a_time, handle = threading.Lock(), server.Router.handle


def handle_alone(self, method):
    with one_at_a_time:  # the storage, and the conditions above
        handle(self, method)


server.Router.handle = handle_alone
server.HANDLERS = ((MOVE, {"POST": move}), *server.HANDLERS)

if __name__ == "__main__":
    running = server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
    running.start()
    print("ready", flush=True)
    sys.stdin.read()
    running.stop()
