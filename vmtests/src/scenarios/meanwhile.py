"""Programs that are frozen (`server DIR`, `asks DIR`, `echoes DIR`, `waits DIR`) and what reaches
them meanwhile, most of it after the pass over their descriptors: `peer DIR CGROUP`, `forges DIR
CGROUP`, `calls DIR CGROUP` and `thaws DIR CGROUP`. `observes DIR CGROUP` looks at who does that,
and `occupies DIR` has a CPU half of the time."""

import os
import pathlib
import selectors
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


def await_frozen(cgroup):
    events = pathlib.Path(cgroup, "cgroup.events")
    await_that(lambda: "frozen 1" in events.read_text())
    # The descriptors are read right after that; what takes longer comes next.
    time.sleep(0.5)


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
    await_frozen(cgroup)
    closed.shutdown(socket.SHUT_WR)
    for connection in (reset, closed):
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    await_that((directory / "go").exists)
    stays.shutdown(socket.SHUT_WR)
    await_that((directory / "result").exists)


def asks(directory):
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        for end in (client, server):
            end.bind(("127.0.0.1", 0))
        client.connect(server.getsockname())
        server.sendto(b"answer", client.getsockname())
        ports = f"{client.getsockname()[1]} {server.getsockname()[1]}"
        publish(directory / "ready", ports)
        await_that((directory / "go").exists)
        try:
            first = client.recv(16)
        except OSError as error:
            first = error.errno
        publish(directory / "result", f"{first}, then {client.recv(16)}")


def forges(directory, cgroup):
    client, server = map(int, (directory / "ready").read_text().split())
    loopback = socket.inet_aton("127.0.0.1")
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, socket.IPPROTO_UDP, 0, loopback, loopback
    )
    datagram = struct.pack("!HHHH", client, server, 8, 0)
    message = struct.pack("!BBHI", 3, 3, 0, 0) + header + datagram
    words = sum(struct.unpack(f"!{len(message) // 2}H", message))
    words = (words >> 16) + (words & 0xFFFF)
    message = message[:2] + struct.pack("!H", ~(words + (words >> 16)) & 0xFFFF) + message[4:]
    await_frozen(cgroup)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(message, ("127.0.0.1", 0))


CALLERS = 30


def echoes(directory):
    with socket.create_server(ADDRESS) as listener, selectors.DefaultSelector() as selector:
        publish(directory / "listens", "")
        for _ in range(CALLERS):
            selector.register(listener.accept()[0], selectors.EVENT_READ)
        publish(directory / "ready", "")
        count = 0
        while selector.get_map():
            for key, _ in selector.select():
                asked = read(key.fileobj, 64)
                if isinstance(asked, bytes) and asked:
                    key.fileobj.sendall(asked)
                    count += 1
                else:
                    selector.unregister(key.fileobj)
        publish(directory / "result", str(count > CALLERS))


def calls(directory, cgroup):
    with selectors.DefaultSelector() as selector:
        for _ in range(CALLERS):
            connection = socket.create_connection(ADDRESS)
            selector.register(connection, selectors.EVENT_READ, [0])
            connection.sendall(b"0")
        while not (directory / "go").exists():
            for key, _ in selector.select(0.1):
                answer = int(key.fileobj.recv(64))
                if answer != key.data[0]:
                    sys.exit(f"{answer} instead of {key.data[0]}")
                key.data[0] += 1
                key.fileobj.sendall(str(key.data[0]).encode())


def waits(directory):
    publish(directory / "ready", "")
    await_that((directory / "go").exists)
    publish(directory / "result", "went on")


def thaws(directory, cgroup):
    await_frozen(cgroup)
    pathlib.Path(cgroup, "cgroup.freeze").write_text("0")


def observes(directory, cgroup):
    await_frozen(cgroup)
    policies = []
    for name in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        if name.read_bytes().startswith(b"tracker\0checkpoint\0"):
            policies.append(os.sched_getscheduler(int(name.parent.name)))
    publish(directory / "observed", str(sorted(policies)))


def occupies(_):
    while True:
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass
        time.sleep(0.05)


roles = {
    "server": server,
    "peer": peer,
    "asks": asks,
    "forges": forges,
    "echoes": echoes,
    "calls": calls,
    "waits": waits,
    "thaws": thaws,
    "observes": observes,
    "occupies": occupies,
}
roles[sys.argv[1]](pathlib.Path(sys.argv[2]), *sys.argv[3:])
