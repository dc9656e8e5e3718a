//! Servers from Debian's packages, ended and restored while their clients are connected.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::tracked::{PATIENCE, PAUSE, log, start, start_beside};
use super::{Kernels, Scenario};
use crate::apps;
use crate::vm::{Exec, Vm, VmBuilder};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    of("programs_nginx", |vm| restored(vm, &NGINX)),
    of("programs_haproxy", |vm| restored(vm, &HAPROXY)),
    of("programs_postgres", |vm| restored(vm, &POSTGRES)),
    of("programs_mariadb", |vm| restored(vm, &MARIADB)),
    of("programs_node", |vm| restored(vm, &NODE)),
    of("programs_asyncio", |vm| restored(vm, &ASYNCIO)),
    of("programs_java", |vm| restored(vm, &JAVA)),
    of("programs_sshd", |vm| restored(vm, &SSHD)),
];

const fn of(name: &'static str, run: fn(&Vm) -> Result<()>) -> Scenario {
    Scenario {
        name,
        kernels: Kernels::Either,
        configure,
        run,
    }
}

fn configure(vm: VmBuilder) -> VmBuilder {
    vm.memory_mib(2048)
}

/// A server.
#[derive(Debug)]
pub(super) struct Server {
    /// Name of the application.
    pub name: &'static str,
    /// Runs once before it is started.
    pub prepare: &'static str,
    /// Its command.
    pub command: &'static [&'static str],
    /// Its log has this once it can be used.
    pub ready: &'static str,
}

/// A master and three workers.
pub(super) const NGINX: Server = Server {
    name: "nginx",
    prepare: "cat >/root/nginx.conf <<'END'
worker_processes 3;
daemon off;
pid /tmp/nginx.pid;
error_log stderr notice;
events { worker_connections 200; }
http { access_log off; server { listen 127.0.0.1:8080; root /var/www/html; } }
END
echo hello >/var/www/html/index.html
dd if=/dev/urandom of=/var/www/html/big bs=1M count=16 status=none",
    command: &["nginx", "-c", "/root/nginx.conf"],
    ready: "start worker process ",
};

/// A master and a worker of two threads, which watch each other by timers on their CPU clocks. What
/// its clients ask it asks itself, and counts.
const HAPROXY: Server = Server {
    name: "haproxy",
    prepare: r#"cat >/root/haproxy.cfg <<'END'
global
    nbthread 2
defaults
    mode http
    timeout connect 600s
    timeout client 600s
    timeout server 600s
frontend outer
    bind 127.0.0.1:8090
    default_backend inner
backend inner
    http-reuse always
    server itself 127.0.0.1:8091
frontend counter
    bind 127.0.0.1:8091
    stick-table type integer size 10 expire 1h store gpc0
    http-request track-sc0 int(1)
    http-request sc-inc-gpc0(0)
    http-request return status 200 content-type text/plain lf-string "%[sc0_get_gpc0]"
END"#,
    command: &["haproxy", "-W", "-db", "-f", "/root/haproxy.cfg"],
    ready: "Loading success",
};

/// As user postgres, with nothing outside of it but TCP.
pub(super) const POSTGRES: Server = Server {
    name: "postgres",
    prepare: "echo 'host all all 127.0.0.1/32 trust\nlocal all all trust' >/tmp/hba.conf",
    command: &[
        "setpriv",
        "--reuid=postgres",
        "--regid=postgres",
        "--clear-groups",
        "--reset-env",
        "/usr/lib/postgresql/15/bin/postgres",
        "-D",
        "/var/lib/postgresql/15/main",
        "-c",
        "config_file=/etc/postgresql/15/main/postgresql.conf",
        "-c",
        "hba_file=/tmp/hba.conf",
        "-c",
        "external_pid_file=",
        "-c",
        "unix_socket_directories=/tmp",
        "-c",
        "ssl=off",
    ],
    ready: "ready to accept connections",
};

/// With io_uring, and triggers of memory pressure.
const MARIADB: Server = Server {
    name: "mariadb",
    prepare: "mariadb-install-db --no-defaults --user=root --datadir=/var/lib/mariadb \
        --auth-root-authentication-method=normal --skip-test-db >/root/install.log 2>&1",
    command: &[
        "mariadbd",
        "--no-defaults",
        "--user=root",
        "--datadir=/var/lib/mariadb",
        "--bind-address=127.0.0.1",
        "--socket=/root/mariadb.sock",
    ],
    ready: "ready for connections",
};

const NODE: Server = Server {
    name: "node",
    prepare: ":",
    command: &["node", "/root/squares.js"],
    ready: "listening",
};

const ASYNCIO: Server = Server {
    name: "asyncio",
    prepare: ":",
    command: &["python3", "/root/counter.py"],
    ready: "listening",
};

/// The source as it is: the runtime has the compiler, and compiles in the server's own process.
const JAVA: Server = Server {
    name: "java",
    prepare: ":",
    command: &[
        "java",
        "-Xmx64m",
        "-XX:+UseG1GC",
        // Seconds, so that a slow machine's connections are not closed for being idle.
        "-Dsun.net.httpserver.idleInterval=600",
        "/root/Threads.java",
    ],
    ready: "listening",
};

/// With sessions of root, which stay with one process, and of a user, which are in two.
const SSHD: Server = Server {
    name: "sshd",
    prepare: "set -e
mkdir -p /run/sshd
useradd --create-home --shell /bin/bash --password '*' visitor
ssh-keygen -q -t ed25519 -N '' -f /root/key
for home in /root /home/visitor; do install -D -m 644 /root/key.pub $home/.ssh/authorized_keys; done
printf '%s\n' 'Port 2222' 'ListenAddress 127.0.0.1' 'UsePAM no' 'PidFile none' >/root/sshd.conf",
    command: &["/usr/sbin/sshd", "-D", "-e", "-f", "/root/sshd.conf"],
    ready: "Server listening on",
};

/// The clients get late answers, and nothing else.
fn restored(vm: &Vm, server: &Server) -> Result<()> {
    vm.write_file("/root/clients.py", include_bytes!("clients.py"))?;
    vm.write_file("/root/counter.py", include_bytes!("counter.py"))?;
    vm.write_file("/root/squares.js", include_bytes!("squares.js"))?;
    vm.write_file("/root/Threads.java", include_bytes!("Threads.java"))?;
    let name = server.name;
    let patient = |script: &str| Exec::new(["sh", "-c", script]).timeout(PATIENCE);
    vm.exec(patient(server.prepare))?.check()?;
    start(vm, name, server.command, server.ready)?;
    let client = ["python3", "/root/clients.py", name];
    let client = start_beside(vm, "client", &client, "before")?;

    let image = format!("/root/{name}.image");
    let before = apps::pids(vm, name)?;
    let checkpoint = apps::checkpoint(name, &image, &[]).timeout(PATIENCE);
    vm.exec(checkpoint)?.check()?;
    ensure!(apps::pids(vm, name).is_err(), "It was not ended");
    // Long enough for a peer to send again what was not answered.
    std::thread::sleep(Duration::from_secs(1));
    let restore = ["tracker", "restore", "--image", &image, "--detach"];
    vm.exec(Exec::new(restore).timeout(PATIENCE))?.check()?;
    let after = apps::pids(vm, name)?;
    ensure!(after == before, "It had PIDs {before:?}, has {after:?}");

    vm.write_file("/root/go", b"")?;
    let begun = Instant::now();
    let ended = loop {
        if let Some(how) = vm.wait(client, PAUSE)? {
            break how;
        }
        ensure!(begun.elapsed() < PATIENCE, "The client waits for answers");
    };
    ensure!(
        ended == crate::protocol::Status::Exited(0),
        "The client ended: {ended}\n{}\n{}",
        log(vm, "/root/client.log"),
        log(vm, &format!("/root/{name}.log"))
    );
    // They end as they would have.
    let end = "group=/sys/fs/cgroup/tracker/$1
        # Some end before their own signal, when their master does.
        for pid in $(cat $group/cgroup.procs); do kill $pid 2>/dev/null; done
        for try in $(seq 300); do [ -z \"$(cat $group/cgroup.procs)\" ] && exit; sleep 0.1; done
        exit 1";
    vm.exec(Exec::new(["sh", "-c", end, "sh", name]).timeout(PATIENCE))?
        .check()
        .context("They do not end on SIGTERM")?;
    Ok(())
}
