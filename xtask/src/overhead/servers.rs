//! What requests cost servers that run as they come: the CPU time of their
//! cgroup, without that of their clients, which are never tracked.

use anyhow::{Context, Result};
use vmtests::overhead::{Cost, cgroup_usage};
use vmtests::vm::Exec;

use super::{AGENT_CGROUP, Bench, PATIENCE, Place};

/// Connections that the requests come over. With one, the server sleeps once
/// for each request; with more, how often it does hangs on who runs when, and an
/// agent that wakes now and then changes that by more than its hooks cost.
const CLIENTS: &str = "1";

/// A program that answers requests.
struct Server {
    name: &'static str,
    command: &'static [&'static str],
    /// Ends with 0 when it answers.
    probe: &'static str,
    requests: &'static [Requests],
}

/// One kind of request.
struct Requests {
    name: &'static str,
    /// A client's command, to which the number of requests is added.
    client: &'static [&'static str],
}

const SERVERS: &[Server] = &[
    Server {
        name: "redis",
        command: &["redis-server", "--save", "", "--dir", "/tmp"],
        probe: "redis-cli ping | grep -q PONG",
        requests: &[
            Requests {
                name: "redis SET",
                client: &["redis-benchmark", "-q", "-t", "set", "-c", CLIENTS, "-n"],
            },
            Requests {
                name: "redis GET",
                client: &["redis-benchmark", "-q", "-t", "get", "-c", CLIENTS, "-n"],
            },
        ],
    },
    Server {
        name: "nginx",
        command: &["nginx", "-c", NGINX_CONF],
        probe: "ab -n 1 http://127.0.0.1:8080/text",
        requests: &[
            Requests {
                name: "nginx text",
                client: &["sh", "-c", AB, "http://127.0.0.1:8080/text"],
            },
            Requests {
                name: "nginx file",
                client: &["sh", "-c", AB, "http://127.0.0.1:8080/passwd"],
            },
        ],
    },
];

/// `ab` takes the number before the address, and ends with 0 whatever the answers are.
const AB: &str = "ab -q -k -c 1 -n \"$1\" \"$0\" | grep -x 'Failed requests: *0'";

const NGINX_CONF: &str = "/root/nginx.conf";

/// One worker that keeps connections; `/text` is answered from memory, others
/// open a file.
const NGINX: &str = "\
daemon off;
user root;
worker_processes 1;
events {}
http {
    access_log off;
    keepalive_requests 1000000000;
    server {
        listen 127.0.0.1:8080;
        root /etc;
        location = /text { return 200 'answered from memory'; }
    }
}
";

/// CPU time, in nanoseconds, and the guest's uptime.
struct Usage {
    server: f64,
    agent: f64,
    uptime: f64,
}

/// The names of all kinds of requests.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SERVERS
        .iter()
        .flat_map(|server| server.requests.iter().map(|requests| requests.name))
}

/// Measures the servers.
pub(super) fn costs(bench: &Bench, place: Place, agent: bool) -> Result<Vec<Cost>> {
    if !names().any(|name| bench.arguments.wants(name)) {
        return Ok(Vec::new());
    }
    bench.vm.write_file(NGINX_CONF, NGINX.as_bytes())?;
    let idle = agent.then(|| idle_rate(bench, place)).transpose()?;
    let mut costs = Vec::new();
    for server in SERVERS {
        let chosen: Vec<&Requests> = server
            .requests
            .iter()
            .filter(|requests| bench.arguments.wants(requests.name))
            .collect();
        if chosen.is_empty() {
            continue;
        }
        let log = format!("/root/{}.log", server.name);
        let pid = bench.vm.spawn(place.run(server.command), Some(&log))?;
        bench
            .await_that(server.probe)
            .with_context(|| format!("No answer from {}", bench.said(server.name, &log)))?;
        for requests in chosen {
            let cost = measure(bench, place, requests, idle);
            costs.push(cost.with_context(|| requests.name.to_owned())?);
        }
        bench.stop(pid)?;
    }
    Ok(costs)
}

/// CPU time that the agent uses when nothing happens, for each second.
fn idle_rate(bench: &Bench, place: Place) -> Result<f64> {
    let before = usage(bench, place)?;
    bench.vm.sh("sleep 5")?.check()?;
    let after = usage(bench, place)?;
    Ok((after.agent - before.agent) / (after.uptime - before.uptime))
}

fn measure(bench: &Bench, place: Place, requests: &Requests, idle: Option<f64>) -> Result<Cost> {
    let count = bench.arguments.requests;
    let number = count.to_string();
    let client = || -> Result<()> {
        let command = [requests.client, &[number.as_str()]].concat();
        let output = bench.vm.exec(Exec::new(command).timeout(PATIENCE))?;
        output.check().map(|_| ())
    };
    // Caches fill.
    client()?;
    let mut costs = Vec::new();
    let begun = usage(bench, place)?;
    let mut last = begun.server;
    for _ in 0..bench.arguments.rounds {
        client()?;
        let now = usage(bench, place)?.server;
        costs.push((now - last) / f64::from(count));
        last = now;
    }
    // The agent may be behind.
    bench.vm.sh("sleep 3")?.check()?;
    let ended = usage(bench, place)?;
    let all = f64::from(count) * f64::from(u32::try_from(bench.arguments.rounds)?);
    costs.sort_by(f64::total_cmp);
    let cost = |index: usize| costs.get(index).copied().unwrap_or(f64::NAN);
    Ok(Cost {
        name: requests.name.to_owned(),
        median: cost(costs.len() / 2),
        low: cost(0),
        high: cost(costs.len().saturating_sub(1)),
        agent: idle.map(|rate| {
            let idle = rate * (ended.uptime - begun.uptime);
            (ended.agent - begun.agent - idle) / all
        }),
        programs: std::collections::BTreeMap::new(),
    })
}

fn usage(bench: &Bench, place: Place) -> Result<Usage> {
    let read = |path: &str| -> Result<String> {
        Ok(String::from_utf8_lossy(&bench.vm.read_file(path)?).into_owned())
    };
    let of = |cgroup: &str| -> Result<f64> {
        let path = format!("{cgroup}/cpu.stat");
        cgroup_usage(&read(&path)?).with_context(|| format!("No usage_usec in {path}"))
    };
    let uptime = read("/proc/uptime")?;
    let first = uptime
        .split_ascii_whitespace()
        .next()
        .context("No uptime")?;
    Ok(Usage {
        server: of(&place.cgroup())?,
        agent: of(AGENT_CGROUP)?,
        uptime: first.parse().context("The uptime")?,
    })
}
