"""A server whose peers end their connections while it is frozen: `server DIR`, `peer DIR CGROUP`."""

import pathlib
import socket
import struct
import sys
import time

ADDRESS = ("127.0.0.1", 7001)


def await_that(condition):
    while not condition():
        time.sleep(0.02)


def publish(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.rename(path)


def read(connection, count):
    try:
        return connection.recv(count)
    except OSError as error:
        return error.errno


def server(directory):
    with socket.create_server(ADDRESS) as listener:
        connections = [listener.accept()[0] for _ in range(3)]
        publish(directory / "ready", "")
        await_that((directory / "go").exists)
        said = []
        for connection in connections:
            received = connection.recv(6)
            rest = [read(connection, 1), read(connection, 1)]
            error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            said.append(f"{received.decode()} {rest} {error}")
        publish(directory / "result", "; ".join(said))


def peer(directory, cgroup):
    reset, closed, stays = [socket.create_connection(ADDRESS) for _ in range(3)]
    for connection in (reset, closed, stays):
        connection.sendall(b"unread")
    events = pathlib.Path(cgroup, "cgroup.events")
    await_that(lambda: "frozen 1" in events.read_text())
    # The descriptors are read right after that; what takes longer comes next.
    time.sleep(0.5)
    closed.shutdown(socket.SHUT_WR)
    for connection in (reset, closed):
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    await_that((directory / "go").exists)
    stays.shutdown(socket.SHUT_WR)
    await_that((directory / "result").exists)


roles = {"server": server, "peer": peer}
roles[sys.argv[1]](pathlib.Path(sys.argv[2]), *sys.argv[3:])
