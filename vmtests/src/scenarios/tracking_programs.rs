//! Real programs, at work while the agent's model of them is compared with the kernel.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::programs::{NGINX, POSTGRES};
use super::tracked::{
    PATIENCE, PAUSE, application, audited, audited_at_rest, await_status, calm, end, log, lost,
    resume, start, start_agent, status, stop,
};
use super::{Kernels, Scenario};
use crate::vm::{Exec, Vm, VmBuilder};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_programs_fentry",
        kernels: Kernels::Either,
        configure,
        run: |vm| programs(vm, "fentry"),
    },
    Scenario {
        name: "tracking_programs_fallback",
        kernels: Kernels::Either,
        configure,
        run: |vm| programs(vm, "fallback"),
    },
];

fn configure(vm: VmBuilder) -> VmBuilder {
    vm.memory_mib(4096)
}

/// Audits of each program while it works.
const AUDITS: usize = 3;

/// A program and what it is busy with.
struct Program {
    name: &'static str,
    /// Runs once before it is started.
    prepare: &'static str,
    command: &'static [&'static str],
    /// Its log has this once it can be used.
    ready: &'static str,
    /// Runs once when it can be used.
    furnish: &'static str,
    /// Runs over and over.
    load: &'static str,
    /// Processes that it has at least under load, and descriptors.
    processes: u64,
    descriptors: u64,
}

const PROGRAMS: &[Program] = &[
    Program {
        name: "redis",
        prepare: ":",
        command: &[
            "redis-server",
            "--save",
            "",
            "--maxclients",
            "2000",
            "--dir",
            "/tmp",
        ],
        ready: "Ready to accept",
        furnish: ":",
        load: "ulimit -n 4096; redis-benchmark -q -c 1000 -n 10000 -t set,get",
        processes: 1,
        descriptors: 1000,
    },
    Program {
        name: "nginx",
        prepare: NGINX.prepare,
        command: NGINX.command,
        ready: NGINX.ready,
        furnish: ":",
        // With and without connections that last.
        load: "ab -q -k -c 60 -n 3000 http://127.0.0.1:8080/ && \
               ab -q -c 20 -n 300 http://127.0.0.1:8080/",
        processes: 4,
        descriptors: 40,
    },
    Program {
        name: "postgres",
        prepare: POSTGRES.prepare,
        command: POSTGRES.command,
        ready: POSTGRES.ready,
        furnish: "cd /tmp && setpriv --reuid=postgres --regid=postgres --clear-groups \
                  /usr/lib/postgresql/15/bin/pgbench --host=/tmp --initialize --quiet postgres",
        // Backends that last, then one for each transaction.
        load: "cd /tmp && pgbench='setpriv --reuid=postgres --regid=postgres --clear-groups \
               /usr/lib/postgresql/15/bin/pgbench --host=/tmp --no-vacuum' && \
               $pgbench --client=8 --jobs=2 --time=10 postgres && \
               $pgbench --client=4 --select-only --connect --transactions=20 postgres",
        processes: 8,
        descriptors: 100,
    },
    Program {
        name: "node",
        prepare: ":",
        command: &["node", "/root/workers.js"],
        ready: "listening",
        furnish: ":",
        load: "ab -q -k -c 20 -n 1000 http://127.0.0.1:3000/",
        processes: 1,
        descriptors: 40,
    },
];

fn programs(vm: &Vm, hooks: &str) -> Result<()> {
    vm.write_file("/root/workers.js", include_bytes!("workers.js"))?;
    let agent = start_agent(vm, hooks, &[])?;
    for program in PROGRAMS {
        at_work(vm, program).with_context(|| program.name.to_owned())?;
        let now = status(vm)?;
        println!("lost {}, counters {}", lost(&now)?, now["counters"]);
    }
    stop(vm, agent)
}

/// Audits a program while it works, and once more when it stands still in the middle of it.
fn at_work(vm: &Vm, program: &Program) -> Result<()> {
    let name = program.name;
    let patient = |script: &str| Exec::new(["sh", "-c", script]).timeout(PATIENCE);
    vm.exec(patient(program.prepare))?.check()?;
    let pid = start(vm, name, program.command, program.ready)?;
    vm.exec(patient(program.furnish))?.check()?;

    let load_log = format!("/root/{name}.load.log");
    let forever = format!("while :; do {} || exit 1; done", program.load);
    let load = vm.spawn(Exec::new(["sh", "-c", &forever]), Some(&load_log))?;
    let enough = |size: &serde_json::Value, least| size.as_u64() >= Some(least);
    let mut under_load = 0;
    while under_load < AUDITS {
        if let Some(how) = vm.wait(load, Duration::ZERO)? {
            bail!("The load ended: {how}\n{}", log(vm, &load_log));
        }
        let when = format!("{name} at work");
        await_status(vm, &when, |now| {
            application(now, name).is_some_and(|app| {
                enough(&app["sizes"]["processes"], program.processes)
                    && enough(&app["sizes"]["descriptors"], program.descriptors)
            })
        })?;
        let report = audited(vm, &when, program.processes)?;
        let unstable = report["unstable"].as_array().map_or(0, Vec::len);
        println!("{} rounds, {unstable} changed every time", report["rounds"]);
        // The load may have had a pause just then.
        if enough(&report["compared"]["descriptors"], program.descriptors) {
            under_load += 1;
        }
    }
    let begun = Instant::now();
    loop {
        calm(vm, name)?;
        let report = audited_at_rest(vm, &format!("{name} stopped at work"), program.processes)?;
        if enough(&report["compared"]["descriptors"], program.descriptors / 2) {
            break;
        }
        // Again in a pause of the load.
        ensure!(begun.elapsed() < PATIENCE, "{name} has no work: {report:#}");
        resume(vm, name)?;
        std::thread::sleep(PAUSE);
    }
    vm.kill(-load, libc::SIGKILL)?;
    ensure!(vm.wait(load, PATIENCE)?.is_some(), "The load lives on");
    end(vm, name, pid)
}
