"""Clients that talk with a server before and after it is restored, over the same connections.

Each exchanges something, prints "before", and goes on once /root/go exists. Nothing of what was
said before may be lost, and no connection be made again.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection


def between():
    print("before", flush=True)
    while not os.path.exists("/root/go"):
        time.sleep(0.1)


def equal(found, wanted):
    if found != wanted:
        sys.exit(f"{found!r}, not {wanted!r}")


def http(port):
    connection = HTTPConnection("127.0.0.1", port)
    connection.connect()
    # Or a connection that was lost would be made again without a word.
    connection.auto_open = 0
    return connection


def get(connection, path="/"):
    connection.request("GET", path)
    return connection.getresponse().read()


def nginx():
    """Connections that last, and a download that is in the middle."""
    with open("/var/www/html/big", "rb") as file:
        wanted = hashlib.sha256(file.read()).digest()
    kept = [http(8080) for _ in range(8)]
    for connection in kept:
        equal(get(connection), b"hello\n")
    download = socket.create_connection(("127.0.0.1", 8080))
    download.sendall(b"GET /big HTTP/1.0\r\n\r\n")
    received = download.recv(1 << 16)
    between()
    for connection in kept:
        equal(get(connection), b"hello\n")
    while part := download.recv(1 << 20):
        received += part
    body = received.split(b"\r\n\r\n", 1)[1]
    equal(hashlib.sha256(body).digest(), wanted)


def node():
    """A server whose counter only it knows, and whose answers come from its worker threads."""
    kept = [http(3000) for _ in range(8)]
    for number, connection in enumerate(kept, 1):
        equal(get(connection), b"%d %d\n" % (number, number * number))
    between()
    for number, connection in enumerate(kept, 9):
        equal(get(connection), b"%d %d\n" % (number, number * number))


def counters(port):
    """A server that counts the lines of each connection."""
    kept = [socket.create_connection(("127.0.0.1", port)).makefile("rw") for _ in range(8)]

    def say(number):
        for client, stream in enumerate(kept):
            stream.write(f"client {client}\n")
            stream.flush()
            equal(stream.readline(), f"{number} client {client}\n")

    say(1)
    say(2)
    between()
    say(3)


def postgres():
    """A session in the middle of a transaction, with a table that only it sees."""
    command = "psql --host=127.0.0.1 --username=postgres --no-psqlrc -qAtX -v ON_ERROR_STOP=1"
    session = subprocess.Popen(
        command.split(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(statement, answer):
        session.stdin.write(statement + "\n")
        session.stdin.flush()
        equal(session.stdout.readline(), answer + "\n")

    def elsewhere(statement):
        return subprocess.run(
            [*command.split(), "-c", statement], capture_output=True, text=True, check=True
        ).stdout

    elsewhere("CREATE TABLE kept AS SELECT generate_series(1, 10000) AS n")
    ask("SELECT pg_backend_pid() > 0;", "t")
    session.stdin.write("CREATE TEMP TABLE mine AS SELECT 42 AS n;\nBEGIN;\n")
    session.stdin.write("DELETE FROM kept WHERE n > 5000;\n")
    ask("SELECT count(*) FROM kept;", "5000")
    between()
    # What is not committed is seen by nobody else, and goes on.
    equal(elsewhere("SELECT count(*) FROM kept"), "10000\n")
    ask("SELECT (SELECT count(*) FROM kept) + (SELECT n FROM mine);", "5042")
    session.stdin.write("COMMIT;\n")
    ask("SELECT txid_current() > 0;", "t")
    equal(elsewhere("SELECT count(*) FROM kept"), "5000\n")
    # The log that all of it is in can be closed off and written out.
    equal(elsewhere("CHECKPOINT; SELECT pg_is_in_recovery()"), "f\n")
    session.stdin.close()
    equal(session.wait(), 0)


{
    "nginx": nginx,
    "node": node,
    "asyncio": lambda: counters(7000),
    "postgres": postgres,
}[sys.argv[1]]()
