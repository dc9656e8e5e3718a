"""A server and its client, each of which changes something only when it is told to.

`server FAMILY`: a keeper makes a listener and forks the server, which it names by a line `server
PID`. On SIGUSR1 the server accepts a connection and says `accepted N`; on SIGUSR2 the keeper
makes the queue of the listener longer and says `kept`.

`client FAMILY`: on SIGUSR1 it connects and says `connected N`; on SIGUSR2 it shuts its side of
the first connection and says `shut`; on SIGALRM it resets the second and says `reset`.
"""

import os
import signal
import socket
import struct
import sys

role, family = sys.argv[1:]
kind, address = {
    "tcp": (socket.AF_INET, ("127.0.0.1", 7001)),
    "unix": (socket.AF_UNIX, "/root/visits.sock"),
}[family]
connections = []


def say(*words):
    print(*words, flush=True)


def accept(*_):
    connections.append(listener.accept()[0])
    say("accepted", len(connections))


def keep(*_):
    listener.listen(77)
    say("kept")


def connect(*_):
    connection = socket.socket(kind)
    connection.connect(address)
    connections.append(connection)
    say("connected", len(connections))


def shut(*_):
    connections[0].shutdown(socket.SHUT_WR)
    say("shut")


def reset(*_):
    connection = connections.pop(1)
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()
    say("reset")


if role == "server":
    listener = socket.socket(kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(5)
    server = os.fork()
    if server == 0:
        signal.signal(signal.SIGUSR1, accept)
        say("server", os.getpid())
    else:
        signal.signal(signal.SIGUSR2, keep)
else:
    signal.signal(signal.SIGUSR1, connect)
    signal.signal(signal.SIGUSR2, shut)
    signal.signal(signal.SIGALRM, reset)
    say("client")
while True:
    signal.pause()
