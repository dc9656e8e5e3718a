"""Clients that talk with a server before and after it is restored, over the same connections.

Each exchanges something, prints "before", and goes on once /root/go exists. Nothing of what was
said before may be lost, and no connection be made again.
"""

import hashlib
import json
import os
import re
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


def counted(port, answer):
    """Connections that last, with a server whose counter of requests only it knows."""
    kept = [http(port) for _ in range(8)]
    for number, connection in enumerate(kept, 1):
        equal(get(connection), answer(number))
    between()
    for number, connection in enumerate(kept, 9):
        equal(get(connection), answer(number))


def haproxy():
    """Through a proxy that keeps connections of its own, to itself."""
    counted(8090, lambda number: b"%d" % number)


def node():
    """Answers come from worker threads."""
    counted(3000, lambda number: b"%d %d\n" % (number, number * number))


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


class Sql:
    """A session of a client that reads statements, and others beside it."""

    def __init__(self, command, option):
        self.command, self.option = command.split(), option
        self.client = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, statements, answer):
        self.client.stdin.write(statements + "\n")
        self.client.stdin.flush()
        equal(self.client.stdout.readline(), answer + "\n")

    def elsewhere(self, statements):
        return subprocess.run(
            [*self.command, self.option, statements], capture_output=True, text=True, check=True
        ).stdout

    def ends(self):
        self.client.stdin.close()
        equal(self.client.wait(), 0)


def postgres():
    """A session in the middle of a transaction, with a table that only it sees."""
    command = "psql --host=127.0.0.1 --username=postgres --no-psqlrc -qAtX -v ON_ERROR_STOP=1"
    sql = Sql(command, "-c")
    sql.elsewhere("CREATE TABLE kept AS SELECT generate_series(1, 10000) AS n")
    sql.ask("CREATE TEMP TABLE mine AS SELECT 42 AS n; SELECT n FROM mine;", "42")
    sql.ask("BEGIN; DELETE FROM kept WHERE n > 5000; SELECT count(*) FROM kept;", "5000")
    between()
    # What is not committed is seen by nobody else, and goes on.
    equal(sql.elsewhere("SELECT count(*) FROM kept"), "10000\n")
    sql.ask("SELECT (SELECT count(*) FROM kept) + (SELECT n FROM mine);", "5042")
    sql.ask("COMMIT; SELECT txid_current() > 0;", "t")
    equal(sql.elsewhere("SELECT count(*) FROM kept"), "5000\n")
    # The log that all of it is in can be closed off and written out.
    equal(sql.elsewhere("CHECKPOINT; SELECT pg_is_in_recovery()"), "f\n")
    sql.ends()


def mariadb():
    """The same; what is read and written goes through io_uring."""
    pid = subprocess.run(["pgrep", "-x", "mariadbd"], capture_output=True, text=True).stdout.strip()
    fds = f"/proc/{pid}/fd"

    def has_ring():
        return "anon_inode:[io_uring]" in [os.readlink(f"{fds}/{fd}") for fd in os.listdir(fds)]

    equal(has_ring(), True)
    sql = Sql("mariadb --no-defaults --host=127.0.0.1 --user=root -N --unbuffered", "-e")
    sql.elsewhere("CREATE DATABASE d; CREATE TABLE d.kept (n INT PRIMARY KEY, t CHAR(200))")
    sql.elsewhere("INSERT INTO d.kept SELECT seq, seq FROM d.seq_1_to_10000")
    sql.ask("CREATE TEMPORARY TABLE d.mine SELECT 42 AS n; SELECT n FROM d.mine;", "42")
    sql.ask("BEGIN; DELETE FROM d.kept WHERE n > 5000; SELECT COUNT(*) FROM d.kept;", "5000")
    between()
    equal(has_ring(), True)
    equal(sql.elsewhere("SELECT COUNT(*) FROM d.kept"), "10000\n")
    sql.ask("SELECT (SELECT COUNT(*) FROM d.kept) + (SELECT n FROM d.mine);", "5042")
    sql.ask("COMMIT; SELECT 1;", "1")
    equal(sql.elsewhere("SELECT COUNT(*) FROM d.kept"), "5000\n")
    # More than is written at once.
    sql.elsewhere("INSERT INTO d.kept SELECT seq, seq FROM d.seq_10001_to_50000; FLUSH TABLES")
    equal(sql.elsewhere("SELECT COUNT(*), SUM(t = n) FROM d.kept"), "45000\t45000\n")
    equal(sql.elsewhere("CHECK TABLE d.kept EXTENDED"), "d.kept\tcheck\tstatus\tOK\n")
    sql.ends()


def java():
    """A JVM whose threads sleep, wait, park, read and accept, and whose timer counts."""
    web = [http(7101) for _ in range(8)]
    lines = [socket.create_connection(("127.0.0.1", 7100)).makefile("rw") for _ in range(8)]
    said = [0] * len(lines)

    def ask(client, question):
        stream = lines[client]
        stream.write(question + "\n")
        stream.flush()

    def answer(client):
        said[client] += 1
        number, rest = lines[client].readline().split(" ", 1)
        equal(int(number), said[client])
        return rest.rstrip("\n")

    def asked(client, question):
        ask(client, question)
        return answer(client)

    def everybody(turn):
        for number, connection in enumerate(web, 1 + turn * len(web)):
            equal(get(connection), b"%d %d\n" % (number, number * number))
        for client in range(len(lines)):
            equal(asked(client, f"client {client}"), f"client {client}")

    everybody(0)
    everybody(1)
    threads = int(asked(0, "threads"))
    if threads < 40:
        sys.exit(f"Only {threads} threads")
    before = json.loads(asked(0, "ticks"))
    # One that sleeps throughout.
    ask(7, "wait 20000")
    between()
    for client in range(7):
        equal(asked(client, f"again {client}"), f"again {client}")
    # Every thread that waits for some time wakes up again, and none has forgotten its count.
    after = json.loads(asked(0, "ticks"))
    for old, new in zip(before, after, strict=True):
        if new < old:
            sys.exit(f"Counters {before} became {after}")
    while any(now <= old for now, old in zip(json.loads(asked(0, "ticks")), after)):
        time.sleep(0.2)
    equal(asked(1, "threads"), str(threads))
    # The collector stops all of them, and moves what they have.
    equal(asked(2, "collect"), "200")
    equal(asked(3, "release"), "true")
    waited = int(answer(7))
    if not 20000 <= waited < 200000:
        sys.exit(f"20 seconds took {waited} milliseconds")
    everybody(2)
    # Threads can be made as well.
    lines.append(socket.create_connection(("127.0.0.1", 7100)).makefile("rw"))
    said.append(0)
    equal(asked(8, "new"), "new")


class Session:
    """An ssh(1) to the server under test; what it shows is read as it comes."""

    def __init__(self, user, *words):
        options = ["IdentityFile=/root/key", "StrictHostKeyChecking=no", "LogLevel=error"]
        options += ["UserKnownHostsFile=/root/known_hosts", "RekeyLimit=100K"]
        command = ["ssh", "-F", "none", "-p", "2222", "-l", user]
        for option in options:
            command += ["-o", option]
        environment = {**os.environ, "TERM": "dumb"}
        self.ssh = subprocess.Popen(
            [*command, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=environment,
        )
        self.fresh = b""

    def type(self, keys):
        self.ssh.stdin.write(keys.encode())

    def shows(self, pattern):
        """Waits for this, after what was seen before."""
        while not (found := re.search(pattern.encode(), self.fresh)):
            part = os.read(self.ssh.stdout.fileno(), 1 << 16)
            if not part:
                sys.exit(f"{pattern!r} is not shown, but {self.fresh!r}; ssh ends")
            self.fresh += part
        self.fresh = self.fresh[found.end() :]
        return found

    def asked(self, command):
        """What a command prints; its echo has no line that begins so."""
        self.type(f'printf "\\n<%s>\\n" "{command}"\n')
        return self.shows("\n<([^>]*)>\r?\n").group(1).decode()

    def ends(self, status):
        self.ssh.stdin.close()
        while part := os.read(self.ssh.stdout.fileno(), 1 << 16):
            self.fresh += part
        equal((self.ssh.wait(), status), (status, status))


def sshd():
    """A user's shell on a terminal with jobs, and one of root's behind pipes."""
    shell = Session("visitor", "-tt", "localhost")
    equal(shell.asked("$(id -un)"), "visitor")
    shell.type("colour=blue; cd /var/tmp\n")
    # A job of one process, whose PID is compared as well.
    shell.type("mkfifo fifo; while ! read -t 0.2 <>fifo; do echo >>ticks; done &\n")
    terminal = shell.asked("$(tty)")
    if not terminal.startswith("/dev/pts/"):
        sys.exit(f"Its terminal is {terminal}")
    pid = shell.asked("$$ $!")
    pipes = Session("root", "-T", "localhost", 'while read a; do echo "$((++n)) $a"; done; exit 9')
    for number in 1, 2:
        pipes.type(f"line {number}\n")
        pipes.shows(f"^{number} line {number}\n")
    # The foreground is busy, until somebody interrupts it.
    shell.type("sleep 1002\n")
    while subprocess.run(["pgrep", "-fx", "sleep 1002"], capture_output=True).returncode:
        time.sleep(0.1)
    between()
    pipes.type("line 3\n")
    pipes.shows("^3 line 3\n")
    shell.type("\x03")
    equal(shell.asked("$? $colour $PWD"), "130 blue /var/tmp")
    equal((shell.asked("$(tty)"), shell.asked("$$ $!")), (terminal, pid))
    equal(shell.asked("$(jobs -rp)"), pid.split()[1])
    ticks = int(shell.asked("$(wc -l <ticks)"))
    while int(shell.asked("$(wc -l <ticks)")) <= ticks:
        time.sleep(0.2)
    # Keys are exchanged anew on the way, by the monitor and by the user's process.
    shell.type("seq 30000\n")
    for number in range(1, 30001, 100):
        shell.shows(f"\n{number}\r\n")
    shell.shows("\n30000\r\n")
    pipes.type("line " * 50000 + "\n")
    equal(len(pipes.shows("^4 ([line ]*)\n").group(1)), 5 * 50000 - 1)
    shell.type("kill %1; wait %1\n")
    equal(shell.asked("$?"), "143")
    other = Session("visitor", "localhost", "echo other; exit 3")
    other.shows("^other\n")
    other.ends(3)
    shell.type("exit 7\n")
    shell.ends(7)
    pipes.ends(9)


{
    "nginx": nginx,
    "haproxy": haproxy,
    "node": node,
    "asyncio": lambda: counters(7000),
    "postgres": postgres,
    "java": java,
    "mariadb": mariadb,
    "sshd": sshd,
}[sys.argv[1]]()
