# What the agent has in use for 1,000 processes with 100 descriptors each, half of them sockets:
#     cargo xtask vm --kernel 6.12 --script vmtests/scripts/agent-memory.sh
# Prints the agent's resident bytes before and after, and what it tracks.
set -eu

status() {
	tracker status --json | python3 -c '
import json, sys
status = json.load(sys.stdin)
total = status["total"]
names = ["processes", "descriptors", "sockets", "mappings"]
print(sys.argv[1], status["agent"]["resident_bytes"], "bytes,",
      *(f"{total[name]} {name}," for name in names), "lag", status["lag"])
' "$1"
}

tracker agent >/root/agent.log 2>&1 &
until [ -S /run/tracker/agent.sock ]; do sleep 0.2; done
status before

ulimit -n 4096
tracker run --name many -- python3 -c '
import os, socket, sys, time
ready, done = os.pipe()
for _ in range(1000):
    if os.fork() == 0:
        os.close(ready)
        # 0, 1, 2 and the pipe are open already.
        held = [socket.socket() for _ in range(50)]
        files = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(46)]
        os.write(done, b".")
        time.sleep(100000)
for _ in range(1000):
    os.read(ready, 1)
open("/root/held", "w").close()
time.sleep(100000)
' >/root/many.log 2>&1 &
until [ -e /root/held ]; do sleep 1; done
# The mappings are read at most every second.
sleep 10
tracker audit
status after
