"""A process with a child and a grandchild, each with descriptors, threads and an epoll set.

On SIGUSR1 a process forks one more. Each says `ready PID PPID` once it is furnished.
"""

import os
import select
import signal
import socket
import threading
import time

kept = []


def furnish():
    """Descriptors of several kinds, an epoll set over some of them, and threads."""
    near, far = socket.socketpair()
    reader, writer = os.pipe()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    epoll = select.epoll()
    for fd in (near.fileno(), reader, listener.fileno(), server.fileno()):
        epoll.register(fd, select.EPOLLIN)
    null = open("/dev/null")
    copy = os.dup(writer)
    kept.extend([near, far, listener, client, server, epoll, null, reader, writer, copy])
    for _ in range(2):
        threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
    print("ready", os.getpid(), os.getppid(), flush=True)


def multiply(*_):
    if os.fork() == 0:
        furnish()


signal.signal(signal.SIGUSR1, multiply)
for _ in range(2):
    if os.fork() != 0:
        break
furnish()
while True:
    signal.pause()
